"""`vespo-megatron eval`: a folder, a checkpoint and a served model give the scores that training's evaluation gives."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from vespo_megatron.cli import main
from vespo_megatron.evaluation.record import read_problems
from vespo_megatron.launch.evaluate import PROBLEMS, SCORES, TABLE

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "examples" / "tiny_moe" / "in_process.yaml")
SETS = str(ROOT / "examples" / "tiny_moe" / "build" / "data" / "validation.parquet")


@pytest.fixture
def evaluate(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)

    def run(*arguments):
        status = main(["eval", RECIPE, f"exp_manager.exp_dir={tmp_path}", "grpo.max_val_samples=24", *arguments])
        return status, capsys.readouterr()

    return run


def folders(tmp_path):
    return sorted(path.parent for path in tmp_path.rglob(PROBLEMS))


def test_a_folder_is_scored_with_intervals_and_every_problem_is_written(evaluate, tmp_path):
    status, said = evaluate("--samples", "4")
    assert status == 0, said.err
    (folder,) = folders(tmp_path)
    problems = read_problems(folder / PROBLEMS)
    assert len(problems) == 24 and all(len(problem.rewards) == 4 for problem in problems)
    scores = json.loads((folder / SCORES).read_text())["running_sums"]
    assert list(scores) == ["avg@4", "pass@2", "pass@4", "maj@4"]
    assert scores["avg@4"]["low"] <= scores["avg@4"]["value"] <= scores["avg@4"]["high"]
    assert scores["pass@4"]["value"] >= scores["pass@2"]["value"] >= scores["avg@4"]["value"]
    assert (folder / TABLE).read_text().strip() in said.out
    answers = {answer for problem in problems for answer in problem.answers}
    assert answers & set("0123456789")
    # A response is right exactly when its answer is the ground truth: the example's reward compares them.
    for problem in problems:
        for reward, answer in zip(problem.rewards, problem.answers, strict=True):
            assert (reward > 0) == (answer == problem.ground_truth)


def test_a_run_s_checkpoint_is_scored_as_the_model_it_holds(evaluate, tmp_path, monkeypatch):
    changes = [
        "grpo.max_num_steps=1",
        "grpo.num_prompts_per_step=8",
        "grpo.val_period=0",
        "grpo.val_at_start=false",
        "checkpointing.save_period=1",
        "logger.tensorboard_enabled=false",
        "exp_manager.version=one",
        "grpo.val_at_end=false",
    ]
    assert main(["train", RECIPE, f"exp_manager.exp_dir={tmp_path}", *changes]) == 0
    run_dir = next(tmp_path.rglob("one"))
    assert evaluate("--checkpoint", str(run_dir))[0] == 0
    dials = ("policy.generation.mismatch.route_flip=1", "policy.generation.mismatch.activations=fp8_e4m3")
    dials += ("policy.quantization.scheme=int3",)
    # What they do is of training's rollouts: the model answers as it is.
    assert evaluate(*dials, "--checkpoint", str(run_dir / "checkpoints" / "final_hf"))[0] == 0
    assert "RANK" not in os.environ, "whatever is started next would take itself for torchrun's"
    for checkpoint in run_dir.glob("checkpoints/step_*"):
        shutil.rmtree(checkpoint)
    assert evaluate("--checkpoint", str(run_dir))[0] == 0, "a run that has kept its exported policy alone is that"
    first, *others = folders(tmp_path)
    assert len(others) == 2
    assert {(first / PROBLEMS).read_text()} == {(other / PROBLEMS).read_text() for other in others}


@pytest.mark.sglang
def test_a_served_model_is_scored_as_it_is(evaluate, tmp_path, sglang_servers):
    status, said = evaluate(
        "policy.generation.backend=sglang",
        f"policy.generation.sglang_cfg.urls={sglang_servers.urls}",
        "policy.generation.val_temperature=0",
        "policy.max_total_sequence_length=64",
        "--data",
        SETS,
        "--samples",
        "running_sums=2",
    )
    assert status == 0, said.err
    (folder,) = folders(tmp_path)
    # Greedy: the second response is the first.
    assert all(problem.answers[0] == problem.answers[1] for problem in read_problems(folder / PROBLEMS))


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--samples", "none"], "--samples"),
        (["--samples", "aime24=4"], "is no set here"),
        (["--data", "/no/such.parquet"], "/no/such.parquet"),
        (["--checkpoint", "/no/such/run"], "/no/such/run"),
        (["data.validation.path=null"], "data.validation.path"),
    ],
)
def test_what_is_wrong_is_named(arguments, said, evaluate):
    status, output = evaluate(*arguments)
    assert status == 2 and said in output.err
