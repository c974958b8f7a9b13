"""Saving and resuming a whole run: the policy in any layout, and all that the next step depends on.

A save copies the state and returns; a thread on each rank writes it beside training, over a gloo group of its own.
What goes wrong while writing is told and counted, and training goes on: the last good checkpoint is still there.
"""

from __future__ import annotations

import datetime
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vespo_megatron.errors import UserError
from vespo_megatron.megatron import checkpoint as policy_checkpoint
from vespo_megatron.megatron import hf_weights
from vespo_megatron.megatron.parallel import RankInfo
from vespo_megatron.megatron.policy import MegatronPolicy
from vespo_megatron.megatron.weight_history import WeightHistory
from vespo_megatron.recipe.schema import CheckpointingConfig
from vespo_megatron.run.checkpoint_judgement import Record
from vespo_megatron.run.checkpoint_store import (
    POLICY,
    CheckpointStore,
    FileEntry,
    RetentionPolicy,
    damage,
    read_manifest,
)

TRAINER, CONTROLLER, HF, VERSIONS = "trainer.json", "controller.pt", "hf", "weight_versions"


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint that was verified and can be resumed."""

    step: int
    folder: Path
    facts: dict[str, Any]
    """trainer.json"""


class Checkpointer:
    """One rank's; every public method is a collective.

    Args:
        evaluates_after: whether the run's schedule has an evaluation after a step.
    """

    def __init__(
        self,
        config: CheckpointingConfig,
        policy: MegatronPolicy,
        run_dir: Path,
        evaluates_after: Callable[[int], bool] = lambda step: False,
    ) -> None:
        self.config, self.policy, self.rank_info = config, policy, policy.rank_info
        self.store = CheckpointStore(run_dir / "checkpoints")
        self.failure = ""
        """Why the last save failed, the same on every rank; empty when it did not."""
        self._record = Record(run_dir, evaluates_after)
        self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=config.timeout))
        self._thread: threading.Thread | None = None
        self._saved = ""
        self._failures = 0
        self._metrics: dict[str, float] = {}

    # ---- saving ------------------------------------------------------------------------------------------------

    def due(self, step: int, *, last: bool) -> bool:
        """Whether the recipe wants a checkpoint after this step."""
        return self.config.save_period > 0 and (step % self.config.save_period == 0 or last)

    def save(
        self,
        step: int,
        facts: Mapping[str, Any],
        controller: Callable[[], Any] | None = None,
        *,
        history: WeightHistory | None = None,
        wait: bool = False,
    ) -> str:
        """Save everything after `step`; with `wait`, returns the folder when it is on the disk, '' when that failed.

        Args:
            facts: what every rank needs to go on, as JSON.
            controller: rank 0's: gives the state of its controller, of types that `torch.load` trusts.
            history: whose versions are saved besides: samples that wait were drawn by them.
        """
        self.wait()
        started = time.perf_counter()
        partial = self.store.partial(step)
        writes: list[Callable[[], None]] = []
        versions = list(history.to_save()) if history is not None else []

        def make_folders() -> None:
            if self.rank_info.rank == 0:
                self.store.begin(step)
                for version in versions:
                    _version_folder(partial, version).mkdir(parents=True)

        self.failure = ""
        if not self._agreed(make_folders, step):
            return ""

        def copy() -> None:
            if self.rank_info.rank == 0:
                live = [history.live] if history is not None and history.live is not None else []
                versioned = {"held_versions": versions, "live_version": live}
                about = {"step": step, "layout": _layout(self.rank_info), **versioned, **facts}
                (partial / TRAINER).write_text(json.dumps(about, indent=1))
                torch.save(controller() if controller is not None else {}, partial / CONTROLLER)
            writes.append(policy_checkpoint.save(self.policy, partial / POLICY, group=self._group))
            if history is not None:
                writes.extend(self._copy_version(history, version, partial) for version in versions)
            if self.config.save_hf_with_each:
                hf_weights.save(self.policy.exporter, partial / HF, copy_from=self.policy.model_folder)

        if not self._agreed(copy, step):
            return ""
        self._thread = threading.Thread(
            target=self._finish, args=(writes, partial, step, started), name="checkpoint", daemon=True
        )
        self._saved = ""
        self._thread.start()
        if wait or not self.config.async_save:
            self.wait()
        self._metrics["checkpoint/stall_seconds"] = time.perf_counter() - started
        return self._saved

    def wait(self) -> None:
        """Until the write that is under way has ended, well or not."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def pop_metrics(self) -> dict[str, float]:
        """What the last save took, once it is known: `checkpoint/…`."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    def _finish(self, writes: Sequence[Callable[[], None]], partial: Path, step: int, started: float) -> None:
        """Write, take checksums, publish, remove old ones. Runs in the thread."""
        files: dict[str, FileEntry] = {}

        def write_and_read() -> None:
            for write in writes:
                write()
            # What no rank wrote alone is rank 0's.
            for path in sorted(path for path in partial.rglob("*") if path.is_file()):
                shard = path.name.startswith("__")
                if path.name.startswith(f"__{self.rank_info.rank}_") if shard else self.rank_info.rank == 0:
                    files[str(path.relative_to(partial))] = FileEntry.on_disk(path)

        if not self._agreed(write_and_read, step):
            return
        gathered: list[dict[str, FileEntry]] = [{}] * self.rank_info.world_size
        dist.all_gather_object(gathered, files, group=self._group)
        everything = {name: entry for part in gathered for name, entry in part.items()}

        def publish() -> None:
            if self.rank_info.rank == 0:
                self._record.sync()
                self.store.publish(partial, everything)

        if not self._agreed(publish, step):
            return
        if self.rank_info.rank == 0:
            self._prune()
        self._saved = str(partial.with_suffix(""))
        self._metrics["checkpoint/seconds"] = time.perf_counter() - started
        self._metrics["checkpoint/bytes"] = float(sum(entry.size for entry in everything.values()))

    def _copy_version(self, history: WeightHistory, version: int, partial: Path) -> Callable[[], None]:
        with history.under(version):
            return policy_checkpoint.save_weights(
                self.policy.chunks, _version_folder(partial, version), group=self._group
            )

    def _prune(self) -> None:
        config = self.config
        kept = RetentionPolicy(config.keep_last, config.keep_top_k, config.higher_is_better)
        try:
            steps = self.store.checkpoints()
            self.store.prune(kept, self._record.judge(config.metric_name, steps) if config.metric_name else None)
        except OSError as error:
            print(f"vespo-megatron: an old checkpoint cannot be removed: {error}", flush=True)

    def _agreed(self, action: Callable[[], Any], step: int) -> bool:
        """Do it on every rank; False on all of them, and said once, when it failed on one."""
        failure = ""
        try:
            action()
        except policy_checkpoint.FAILURES as error:
            failure = policy_checkpoint.reason(error)
        failures = [""] * self.rank_info.world_size
        dist.all_gather_object(failures, failure, group=self._group)
        if not any(failures):
            return True
        self._failures += 1
        self._metrics["checkpoint/failures"] = float(self._failures)
        rank = next(index for index, text in enumerate(failures) if text)
        self.failure = f"the checkpoint of step {step} failed on rank {rank}: {failures[rank]}"
        if self.rank_info.rank == 0:
            self.store.discard(step)
            last = next(iter(self.store.checkpoints()), None)
            kept = f"the last good one is that of step {last}" if last is not None else "there is none yet"
            print(f"vespo-megatron: {self.failure}; {kept}", flush=True)
        return False

    # ---- resuming ----------------------------------------------------------------------------------------------

    def find(self) -> ResumePoint | None:
        """The newest checkpoint whose files are those that were written; None when the run has none at all.

        Damaged ones are named and passed over.

        Raises:
            UserError: there are checkpoints, and all of them are damaged.
        """
        shared = [list(self.store.checkpoints().items()) if self.rank_info.rank == 0 else []]
        dist.broadcast_object_list(shared, src=0, group=self._group)
        problems: list[str] = []
        for step, folder in shared[0]:
            found = self._damage(folder)
            if not found:
                return ResumePoint(step, folder, json.loads((folder / TRAINER).read_text()))
            problems.append(f"{folder}: {'; '.join(found)}")
            if self.rank_info.rank == 0:
                print(f"vespo-megatron: passing over a damaged checkpoint: {problems[-1]}", flush=True)
        if problems:
            raise UserError(
                "every checkpoint of the run is damaged\n  " + "\n  ".join(problems),
                where=str(self.store.root),
                fix="restore one, or start anew: exp_manager.resume_if_exists=false",
            )
        return None

    def _damage(self, folder: Path) -> list[str]:
        """Each rank reads a part of the files."""
        try:
            names = sorted(read_manifest(folder)["files"])
            found = damage(folder, names[self.rank_info.rank :: self.rank_info.world_size])
        except UserError as error:
            found = [str(error)]
        gathered: list[list[str]] = [[]] * self.rank_info.world_size
        dist.all_gather_object(gathered, found, group=self._group)
        return sorted({text for part in gathered for text in part})

    def load(self, found: ResumePoint, history: WeightHistory | None = None) -> Any:
        """Bring the policy, and the versions of `history`, to what they were; the controller's state on rank 0."""
        if history is not None:
            for version in found.facts.get("held_versions", ())[-history.keep :] if history.keep else ():
                policy_checkpoint.load_weights(self.policy.chunks, _version_folder(found.folder, version))
                history.hold(version)
        same_layout = found.facts["layout"] == _layout(self.rank_info)
        policy_checkpoint.load(self.policy, found.folder / POLICY, same_layout=same_layout)
        if self.rank_info.rank != 0:
            return None
        return torch.load(found.folder / CONTROLLER, weights_only=True)


def _layout(rank_info: RankInfo) -> dict[str, int]:
    """Sizes under which each rank finds its own random state."""
    return {name: value for name, value in vars(rank_info).items() if name.endswith("_size")}


def _version_folder(checkpoint: Path, version: int) -> Path:
    return checkpoint / VERSIONS / str(version)
