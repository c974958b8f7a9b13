"""One real run on one process: where its time, memory and FLOPs go, its profile, and its last step."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vespo_megatron.cli import main
from vespo_megatron.evaluation.record import read_problems
from vespo_megatron.megatron.hardware import peak_tflops
from vespo_megatron.run.metrics_file import read_metrics
from vespo_megatron.trainer.utilization import utilization

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """Two passes over 16 prompts, 8 a step, where the recipe would allow a hundred steps."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        status = main(
            [
                "train",
                "examples/tiny_moe/in_process.yaml",
                "--profile",
                f"exp_manager.exp_dir={folder}",
                "exp_manager.version=one",
                "data.train.max_samples=16",
                "grpo.num_prompts_per_step=8",
                "grpo.max_num_epochs=2",
                "grpo.max_num_steps=100",
                "grpo.val_period=2",
                "grpo.max_val_samples=8",
                "logger.tensorboard_enabled=false",
            ]
        )
    assert status == 0
    return next(folder.rglob("one"))


def test_the_run_ends_after_its_passes_over_the_prompts(run_dir):
    assert [row["step"] for row in read_metrics(run_dir)] == [0, 1, 2, 3, 4]


def test_every_phase_has_its_time_and_memory(run_dir):
    row = read_metrics(run_dir)[-1]
    for phase in ("generate", "scatter", "train", "sync_weights", "evaluate"):
        assert row[f"time/{phase}"] > 0 and 0.05 < row[f"memory/{phase}"] < 24, phase
    assert row["throughput/model_tflop"] > 0 and "throughput/mfu" not in row


def test_a_step_was_traced_and_drawn(run_dir):
    with gzip.open(run_dir / "profile" / "step_2_rank_0.json.gz", "rt") as file:
        names = {event["name"] for event in json.load(file)["traceEvents"]}
    assert {"aten::mm", "_GroupedSwiGLU", "_VocabParallelLogProbs"} <= names
    page = (run_dir / "profile" / "step_2.html").read_text()
    assert "compute_gradients" in page and "<html" in page


def test_evaluations_are_written_problem_by_problem(run_dir):
    written = sorted((run_dir / "evaluations").iterdir())
    assert [path.stem for path in written] == ["step_000000", "step_000002", "step_000004"]
    rewards = [problem.rewards[0] for problem in read_problems(written[-1])]
    assert sum(rewards) / len(rewards) == read_metrics(run_dir)[-1]["eval/running_sums/avg@1"]


def test_utilization_is_work_over_what_the_devices_could_have_done(run_dir, monkeypatch):
    from vespo_megatron.megatron import flops
    from vespo_megatron.recipe.model_shape import read_shape

    shape = read_shape(ROOT / "examples/tiny_moe/build/model")
    samples = [SimpleNamespace(num_tokens=40, response_ids=[0] * 30), SimpleNamespace(num_tokens=9, response_ids=[0])]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    found = utilization(samples, shape, seconds=0.5, device=torch.device("cuda"), devices=4)
    assert found["throughput/model_tflop"] == pytest.approx(flops.training(shape, [40, 9], 31) / 1e12)
    assert found["throughput/mfu"] == pytest.approx(flops.training(shape, [40, 9], 31) / (0.5 * 4 * 989e12))


@pytest.mark.parametrize(
    "name, peak",
    [("NVIDIA H200", 989), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H20", 148), ("Tesla V100-SXM2-16GB", None)],
)
def test_a_device_is_known_by_what_cuda_calls_it(name, peak):
    assert peak_tflops(name) == peak


def test_what_runs_are_forked_from_leaves_cuda_alone():
    """Where CUDA was asked whether it is there, no child can use it; its driver's library may be asked."""
    code = (
        "import torch\n"
        "def asked(): raise AssertionError('CUDA was asked')\n"
        "torch.cuda._is_compiled, torch.cuda._device_count_nvml = (lambda: True), (lambda: 0)\n"
        "torch._C._cuda_getDeviceCount = torch.cuda.init = asked\n"
        "import vespo_megatron.launch.preload\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
