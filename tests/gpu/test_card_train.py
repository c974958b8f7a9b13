"""Whole `vespo-megatron train` runs of one process on a GPU, all started at a time: they share the card.

VESPO_GPU_TEST_DEVICE=cpu rehearses them on a machine without one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from command_line import make_folder, of_this_run, write_rows
from gpu_report import report

from vespo_megatron.recipe.loader import load_recipe, save_recipe
from vespo_megatron.run.metrics_file import read_metrics
from vespo_megatron.run.processes import wait_until
from vespo_megatron.run.run_directory import RECIPE_FILE

pytestmark = [pytest.mark.cuda, pytest.mark.timeout(170)]
ROOT = Path(__file__).parents[2]
DEVICE = os.environ.get("VESPO_GPU_TEST_DEVICE", "cuda")
PREPARED = ROOT / "examples" / "tiny_moe" / "build"
MEGATRON = "policy.megatron_cfg"
COMMON = (
    f"{MEGATRON}.tensor_model_parallel_size=1",
    f"{MEGATRON}.sequence_parallel=false",
    f"{MEGATRON}.expert_model_parallel_size=1",
    f"{MEGATRON}.optimizer.lr=3e-3",
    "cluster.gpus_per_node=1",
    "logger.tensorboard_enabled=false",
    "exp_manager.resume_if_exists=true",
    "env.reward=rewards_of_mine:spread",
    "grpo.num_generations_per_prompt=8",
    "policy.train_global_batch_size=16",  # two updates a step
    "grpo.max_num_steps=4",
)
RUNS = {
    "float32": (f"cluster.device={DEVICE}", "checkpointing.save_period=2", "checkpointing.keep_last=2"),
    "bfloat16": (
        f"cluster.device={DEVICE}",
        "policy.precision=bfloat16",
        "policy.router_replay.mode=R3",
        "checkpointing.save_period=4",
    ),
    "float16": (
        f"cluster.device={DEVICE}",
        "policy.precision=float16",
        f"{MEGATRON}.optimizer.initial_loss_scale={2.0**32:.0f}",  # what overflows first is skipped
        f"{MEGATRON}.optimizer.hysteresis=1",
        "policy.router_replay.mode=R3",
        "grpo.max_num_steps=12",
    ),
    "dials": (
        f"cluster.device={DEVICE}",
        "policy.precision=bfloat16",
        "policy.router_replay.mode=R2",
        f"{MEGATRON}.recompute_granularity=full",
        f"{MEGATRON}.moe_aux_loss_coeff=0.01",
        f"{MEGATRON}.moe_router_load_balancing_type=global_aux_loss",
        "loss_fn.behavior=recompute",
        "loss_fn.reference_policy_kl_penalty=0.01",
    ),
    "asynchronous": (
        f"cluster.device={DEVICE}",
        "loss_fn.behavior=version",
        "grpo.async_grpo.enabled=true",
        "grpo.async_grpo.max_staleness=2",
        "grpo.async_grpo.sync_every=2",
        "grpo.max_num_steps=6",
        "checkpointing.save_period=6",
    ),
    "on_the_cpu": ("cluster.device=cpu", "grpo.max_num_steps=2"),
}
TIMES = ("wall_time", "time/", "memory/", "throughput/", "checkpoint/")


@dataclass
class Started:
    """A run that was started."""

    folder: Path
    process: subprocess.Popen
    since: float
    known: list[dict] | None = None

    def rows(self, name: str, deadline: float = 120.0) -> list[dict]:
        """Its metrics, once it has ended well."""
        if self.known is not None:
            return self.known
        try:
            status = self.process.wait(max(1.0, self.since + deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            pytest.fail(f"{name} did not end within {deadline:.0f} s:\n{self.tail()}")
        assert status == 0, f"{name} ended with status {status}:\n{self.tail()}"
        rows = [row for row in read_metrics(self.run_dir) if row["step"]]
        report(name=f"train/{name}/seconds from start to end", value=round(time.monotonic() - self.since, 1))
        for phase in ("step", "generate", "train", "sync_weights"):
            report(name=f"train/{name}/time/{phase} of the last step", value=rows[-1][f"time/{phase}"])
        for row in rows:
            wrong = {key: value for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
            assert not wrong, (row["step"], wrong)
        self.known = rows
        return rows

    @property
    def run_dir(self) -> Path:
        return next(self.folder.rglob("metrics.jsonl")).parent

    def tail(self) -> str:
        return (self.folder / "log").read_text(errors="replace")[-6000:]


def start(folder: Path, arguments: list[str]) -> Started:
    """`python ARGUMENTS` in a session of its own, its output in `folder/log`."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT), os.environ["PYTHONPATH"]])}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=ROOT,
            start_new_session=True,
        )
    return Started(folder, process, time.monotonic())


def train(folder: Path, recipe: Path, *overrides: str) -> Started:
    return start(folder, ["-m", "vespo_megatron.cli", "train", str(recipe), *overrides])


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_qwen3_moe_folder):
    """Name → a folder with everything; whatever is left of its runs is killed in the end."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        made[name] = make_folder(tmp_path_factory.mktemp(name), tiny_qwen3_moe_folder)
        words = [f"{left} + {right} =" for left in range(1, 9) for right in range(4)]
        write_rows(
            made[name],
            [{"prompt": each, "data_source": "sums", "reward_model": {"ground_truth": "2"}} for each in words],
        )
        return made[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", str(ROOT)))
        yield make
    for folder in made.values():
        for left in of_this_run(folder):
            with contextlib.suppress(ProcessLookupError):
                left.kill()


@pytest.fixture(scope="module")
def runs(folders):
    """All of them under way, and the forked and the prepared one besides."""
    started = {}
    for name, overrides in RUNS.items():
        folder = folders(name)
        started[name] = train(folder, folder / "recipe.yaml", *COMMON, *overrides)
    folder = folders("forked")
    recipe = load_recipe(folder / "recipe.yaml", [*COMMON, f"cluster.device={DEVICE}", "grpo.max_num_steps=2"])
    save_recipe(recipe, folder / RECIPE_FILE)
    started["forked"] = start(folder, [str(Path(__file__).parent / "forked_run.py"), str(folder / RECIPE_FILE)])
    if (PREPARED / "model").is_dir() and find_spec("math_verify"):
        folder = folders("learns")
        started["learns"] = train(
            folder,
            ROOT / "examples" / "tiny_moe" / "in_process.yaml",
            f"cluster.device={DEVICE}",
            f"exp_manager.exp_dir={folder}",
            "grpo.max_num_steps=6",
            "grpo.val_period=6",
            "grpo.max_val_samples=128",
            "checkpointing.save_hf=false",
            "logger.tensorboard_enabled=false",
        )
    yield started
    for each in started.values():
        each.process.kill()
        each.process.wait(10)


def trained(rows: list[dict], steps: int) -> None:
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert any(row["loss/grad_norm"] > 0 for row in rows), "nothing was trained"


def outcome(run_dir: Path) -> tuple[list[dict], bytes]:
    """(metrics of every step but times, bytes of the final weights)."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in row.items() if not key.startswith(TIMES)} for row in rows]
    return kept, (run_dir / "checkpoints" / "final_hf" / "model-00001.safetensors").read_bytes()


def test_float32(runs):
    rows = runs["float32"].rows("float32")
    trained(rows, 4)
    expected = "cuda" if DEVICE == "cuda" else "cpu"
    assert f"native layers, 1 processes on {expected}" in (runs["float32"].folder / "log").read_text()
    report(name="train/float32/largest difference of log-probs between the engines", value=max_difference(rows))
    assert max_difference(rows) < 1e-3
    assert sorted(path.name for path in (runs["float32"].run_dir / "checkpoints").glob("step_*")) == [
        "step_000002",
        "step_000004",
    ]


def max_difference(rows: list[dict]) -> float:
    return max(row["mismatch/prob_diff_max"] for row in rows)


def test_resumed_it_is_as_if_nothing_had_been(runs, folders):
    """From the checkpoint of step 2: metrics and weights to the last bit."""
    runs["float32"].rows("float32")
    whole = runs["float32"].run_dir
    folder = folders("resumed")
    copied = folder / "runs" / whole.parent.name / whole.name
    copied.parent.mkdir(parents=True)
    shutil.copytree(whole, copied)
    shutil.rmtree(copied / "checkpoints" / "step_000004")
    shutil.rmtree(copied / "checkpoints" / "final_hf")
    text = (runs["float32"].folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text.replace(f"{runs['float32'].folder}/runs", f"{folder}/runs"))
    resumed = train(folder, folder / "recipe.yaml", *COMMON, *RUNS["float32"])
    resumed.rows("resumed")
    assert "resuming after step 2" in (folder / "log").read_text()
    (rows, weights), (found, found_weights) = outcome(whole), outcome(copied)
    assert [row["step"] for row in found] == [row["step"] for row in rows]
    differing = {
        key: (value, again.get(key))
        for row, again in zip(rows, found, strict=True)
        for key, value in row.items()
        if again.get(key) != value
    }
    report(name="train/resumed/metrics that differ", value=len(differing))
    report(name="train/resumed/weights to the last bit", value=found_weights == weights)
    assert not differing and found_weights == weights, differing


def test_bfloat16_with_the_engines_routes(runs):
    rows = runs["bfloat16"].rows("bfloat16")
    trained(rows, 4)
    report(name="train/bfloat16/mismatch/k3", value=max(row["mismatch/k3"] for row in rows))
    report(name="train/bfloat16/routes/agreement", value=min(row["routes/agreement"] for row in rows))
    assert all(row["mismatch/k3"] < 0.05 for row in rows)


def test_float16_with_the_engines_routes_and_a_scale_that_overflows_first(runs):
    rows = runs["float16"].rows("float16")
    last = rows[-1]
    report(name="train/float16/mismatch/k3", value=max(row["mismatch/k3"] for row in rows))
    report(name="train/float16/loss/scale", value=last["loss/scale"])
    assert rows[0]["loss/overflows"] == 2 and rows[0]["loss/updates"] == 0 and rows[0]["loss/grad_norm"] is None
    assert any(row["loss/overflows"] == 0 and row["loss/updates"] == 2 and row["loss/grad_norm"] > 0 for row in rows)
    overflows = sum(row["loss/overflows"] for row in rows)
    assert 1 <= last["loss/scale"] / 2.0 ** (32 - overflows) <= 2, "the last update itself may overflow"
    assert all(row["mismatch/k3"] < 1e-3 and row["loss/skipped_updates"] == 0 for row in rows)


def test_recompute_reference_and_balance(runs):
    rows = runs["dials"].rows("dials")
    trained(rows, 4)


def test_asynchronous_with_weights_of_earlier_versions(runs):
    """In float32 the engines agree to rounding: π_old by version is μ."""
    rows = runs["asynchronous"].rows("asynchronous")
    trained(rows, 6)
    report(name="train/asynchronous/largest difference of log-probs between the engines", value=max_difference(rows))
    assert max_difference(rows) < 1e-3
    assert max(row["staleness/lag_max"] for row in rows) >= 1


def test_on_the_cpu_of_a_machine_with_a_gpu(runs):
    rows = runs["on_the_cpu"].rows("on_the_cpu")
    trained(rows, 2)
    assert "native layers, 1 processes on cpu" in (runs["on_the_cpu"].folder / "log").read_text()


def test_forked_from_a_process_that_has_imported_everything(runs):
    trained(runs["forked"].rows("forked"), 2)


def test_reward_alone_teaches_the_prepared_model(runs):
    if "learns" not in runs:
        pytest.skip("examples/tiny_moe/build is not there (make example), or math-verify is not")
    rows = runs["learns"].rows("learns")
    trained(rows, 6)
    before, after = next(row for row in read_metrics(runs["learns"].run_dir) if row["step"] == 0), rows[-1]
    for when, row in (("before", before), ("after", after)):
        report(name=f"train/learns/greedy accuracy {when}", value=row["eval/running_sums/greedy"])
    assert before["eval/running_sums/greedy"] < 0.2 < 0.7 < after["eval/running_sums/greedy"]


def test_nothing_is_left(runs):
    for name, each in runs.items():
        each.process.wait(60)
        assert wait_until(lambda folder=each.folder: not of_this_run(folder), 10), (name, of_this_run(each.folder))
