"""How stale a sample may be when it is trained on, held by admission: what could only come too late is never sent.

N steps of P groups each are taken between two weight updates, so N·P groups are trained on under every weight version.
A group that is sent as number q among the groups not yet taken (those of this version that were taken count too) is
trained on ⌊q / (N·P)⌋ versions later, if groups are taken in the order they were sent. It is sent only while
q < (max_staleness + 1)·N·P, which bounds its lag by ⌈max_staleness⌉. That is veRL's rule with its
`staleness_threshold` (arXiv 2602.10693 trains with 1.0 and N = 4).

Slow groups are overtaken, but only as far as the bound allows: a batch is not handed out when the groups that are due
would no longer fit into the steps that are left for them; it waits for the slow ones instead. Nothing is sent to be
thrown away, so no prompt is starved for being slow.

Pure bookkeeping: no clocks, no processes. Not thread-safe; one event loop owns it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from vespo_megatron.data.sample import NAMES_ON_DISK, Sample
from vespo_megatron.data.sampling_mask import SamplingMask


@dataclass
class Group:
    """All responses to one prompt, from admission to training."""

    number: int
    """In the order of admission."""
    prompt_id: str
    version: int
    """Weight version at admission: no token of it is older."""
    samples: list[Sample] | None = None
    """None while it is under way."""


@dataclass
class Counts:
    """What became of the groups: sent = trained + aborted + expired + what the buffer holds, at every moment."""

    sent: int = 0
    trained: int = 0
    aborted: int = 0
    """Given up while under way, or without signal."""
    expired: int = 0
    """Too old to be trained on: after a resume with a smaller bound, or by weights that nobody has kept."""
    drawn_again: int = 0
    """Sent once more after a resume, which found them under way; not in the sum."""


@dataclass
class StalenessBuffer:
    """Groups under way and groups that wait to be trained on.

    Args:
        max_staleness: see the module; a fraction is allowed.
        batch_groups: P, groups in a batch.
        sync_every: N, batches between weight updates.
    """

    max_staleness: float
    batch_groups: int
    sync_every: int
    version: int = 0
    taken: int = 0
    """Groups taken since the last weight update."""
    between: list[int] = field(default_factory=list)
    """Versions that came between two of the schedule's, ascending: in lags each counts as the one before it."""
    groups: dict[int, Group] = field(default_factory=dict)
    """By number, in the order of admission."""
    counts: Counts = field(default_factory=Counts)

    @property
    def bound(self) -> int:
        """The largest lag a token can have when it is trained on, in weight versions of the schedule."""
        return math.ceil(self.max_staleness)

    @property
    def under_way(self) -> int:
        """Groups that were sent and have not arrived."""
        return sum(group.samples is None for group in self.groups.values())

    @property
    def waiting(self) -> int:
        """Groups that have arrived."""
        return len(self.groups) - self.under_way

    # ---- sending -----------------------------------------------------------------------------------------------

    def room(self) -> int:
        """How many groups may be sent now."""
        limit = math.floor((self.max_staleness + 1) * self.sync_every * self.batch_groups)
        return max(0, limit - self.taken - len(self.groups))

    def admit(self, prompt_id: str) -> Group:
        """Send one; there must be room."""
        if not self.room():
            raise ValueError("no group may be sent now")
        group = Group(self.counts.sent, prompt_id, self.version)
        self.counts.sent += 1
        self.groups[group.number] = group
        return group

    def arrive(self, group: Group, samples: list[Sample]) -> None:
        """It is complete."""
        group.samples = samples

    def abort(self, group: Group) -> None:
        """It will not be trained on; another may be sent in its place."""
        del self.groups[group.number]
        self.counts.aborted += 1

    # ---- training ----------------------------------------------------------------------------------------------

    def ready(self) -> bool:
        """Whether a batch can be taken now, without a group that is under way becoming too old for its turn."""
        return self._next() is not None

    def take(self) -> list[Group]:
        """A batch: of the groups that have arrived those that are due first; `ready()` must hold."""
        chosen = self._next()
        if chosen is None:
            raise ValueError("no batch is ready")
        for group in chosen:
            del self.groups[group.number]
        self.taken += len(chosen)
        self.counts.trained += len(chosen)
        return chosen

    def new_version(self, version: int, *, between: bool = False) -> list[Group]:
        """The engine has new weights. Returns groups that have thereby become too old, which are not trained on.

        `between`: not by the schedule, but because servers had lost theirs; what is due, and when, stays as it was.
        """
        if version == self.version:  # the same weights again
            return []
        self.version = version
        if between:
            self.between.append(version)
            return []
        self.taken = 0
        late = [group for group in self.groups.values() if self.lag(group.version) > self.bound]
        for group in late:
            del self.groups[group.number]
        self.counts.expired += len(late)
        return late

    def lag(self, version: int) -> int:
        """By how many weight versions of the schedule a token of this one is behind."""
        return self.version - version - (len(self.between) - bisect_right(self.between, version))

    def lags(self, samples: Iterable[Sample]) -> np.ndarray:
        """int64 [tokens]: the lag of every response token."""
        versions = np.concatenate([sample.weight_versions for sample in samples])
        return self.version - versions - (len(self.between) - np.searchsorted(self.between, versions, side="right"))

    def expire_other_versions(self, known: Collection[int]) -> None:
        """Give up groups that wait and have a token that none of the `known` weight versions drew."""
        late = [
            number
            for number, group in self.groups.items()
            if any(not np.isin(sample.weight_versions, list(known)).all() for sample in group.samples or ())
        ]
        for number in late:
            del self.groups[number]
        self.counts.expired += len(late)

    def _next(self) -> list[Group] | None:
        arrived = [group for group in self.groups.values() if group.samples is not None]
        chosen = sorted(arrived, key=lambda group: (group.version, group.number))[: self.batch_groups]
        if len(chosen) < self.batch_groups:
            return None
        gone = {group.number for group in chosen}
        left = [group for group in self.groups.values() if group.number not in gone]
        return chosen if self._fits(left, self.taken + self.batch_groups) else None

    def _fits(self, groups: Iterable[Group], taken: int) -> bool:
        """Whether every group can still be trained on in time: those due by each version fit into its steps."""
        per_version = self.sync_every * self.batch_groups
        due: dict[int, int] = {}
        for version, count in Counter(group.version for group in groups).items():
            ahead = max(0, self.bound - self.lag(version))
            due[ahead] = due.get(ahead, 0) + count
        room, total = per_version - taken, 0
        for ahead in range(self.bound + 1):
            total += due.get(ahead, 0)
            if total > room + ahead * per_version:
                return False
        return True

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything, of types that `torch.load` trusts. What is under way is kept as its prompt, to be sent again."""
        return {
            "version": self.version,
            "taken": self.taken,
            "between": list(self.between),
            "counts": vars(self.counts).copy(),
            "groups": [
                {
                    "number": group.number,
                    "prompt_id": group.prompt_id,
                    "version": group.version,
                    "samples": None if group.samples is None else [_sample_state(one) for one in group.samples],
                }
                for group in self.groups.values()
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> list[Group]:
        """Go on from `state`; returns the groups that were under way, which the caller sends again."""
        self.version, self.taken, self.counts = state["version"], state["taken"], Counts(**state["counts"])
        self.between = list(state.get("between", ()))
        self.groups = {}
        for saved in state["groups"]:
            samples = None if saved["samples"] is None else [_sample_of(one) for one in saved["samples"]]
            group = Group(saved["number"], saved["prompt_id"], saved["version"], samples)
            if samples is None:
                group.version = self.version  # drawn anew, by the weights there are
            self.groups[group.number] = group
        under_way = [group for group in self.groups.values() if group.samples is None]
        self.counts.drawn_again += len(under_way)
        return under_way


def _sample_state(sample: Sample) -> dict[str, Any]:
    state = {NAMES_ON_DISK.get(name, name): value for name, value in vars(sample).items()}
    return _apply_to_arrays(state, np.ndarray, lambda array: torch.from_numpy(array.copy()))


def _sample_of(state: dict[str, Any]) -> Sample:
    plain = _apply_to_arrays(state, torch.Tensor, torch.Tensor.numpy)
    plain |= {name: plain.pop(stored) for name, stored in NAMES_ON_DISK.items() if stored in plain}
    if plain.get("sampling_mask") is not None:
        plain["sampling_mask"] = SamplingMask(**plain["sampling_mask"])
    return Sample(**plain)


def _apply_to_arrays(state: dict[str, Any], kind: type, change: Callable[[Any], Any]) -> dict[str, Any]:
    """`state` with every value of that kind changed, those of `sampling_mask` too."""
    return {
        name: _apply_to_arrays(vars(value), kind, change)
        if isinstance(value, SamplingMask)
        else _apply_to_arrays(value, kind, change)
        if isinstance(value, dict)
        else change(value)
        if isinstance(value, kind)
        else value
        for name, value in state.items()
    }
