"""What the tiny example is for: reward teaches its policy something that it does not do before."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from vespo_megatron.cli import main
from vespo_megatron.run.metrics_file import read_metrics

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_reward_alone_teaches_to_reckon_before_answering(tmp_path, capfd, monkeypatch):
    """Greedily it guesses at first, in four tokens; after six steps it reckons, and is right for it."""
    monkeypatch.chdir(ROOT)
    status = main(
        [
            "train",
            "examples/tiny_moe/in_process.yaml",
            f"exp_manager.exp_dir={tmp_path}",
            "grpo.max_num_steps=6",
            "grpo.val_period=6",
            "grpo.max_val_samples=128",
            "checkpointing.save_hf=false",
            "logger.tensorboard_enabled=false",
        ]
    )
    assert status == 0
    rows = read_metrics(next(tmp_path.rglob("metrics.jsonl")).parent)
    before, after = rows[0], rows[-1]
    assert before["eval/running_sums/greedy"] < 0.2 < 0.7 < after["eval/running_sums/greedy"]
    assert before["eval/response_length_mean"] < 6 < 10 < after["eval/response_length_mean"]
    assert after["eval/running_sums/avg@1"] > before["eval/running_sums/avg@1"] + 0.2
    shown = "".join(capfd.readouterr())
    first = next(line for line in shown.splitlines() if line.startswith("step 0/6"))
    assert first.endswith(f"running_sums/greedy {before['eval/running_sums/greedy']:.3f}")
    for name in ("greedy", "greedy_by/04-07_digits", "by/08-14_digits"):
        assert f"eval/running_sums/{name}: " in shown
    assert "eval/response_length_mean: " in shown


@pytest.mark.nightly
def test_it_learns_in_float16_about_as_in_bfloat16_and_the_engines_are_nearer(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    runs = {}
    for precision in ("bfloat16", "float16"):
        status = main(
            [
                "train",
                "examples/tiny_moe/in_process.yaml",
                f"policy.precision={precision}",
                f"exp_manager.exp_dir={tmp_path / precision}",
                "grpo.max_num_steps=8",
                "grpo.val_period=0",
                "policy.megatron_cfg.optimizer.lr=1e-3",
                "checkpointing.save_hf=false",
                "logger.tensorboard_enabled=false",
            ]
        )
        assert status == 0
        runs[precision] = read_metrics(next((tmp_path / precision).rglob("metrics.jsonl")).parent)
    last = {precision: statistics.fmean(row["reward/mean"] for row in rows[-3:]) for precision, rows in runs.items()}
    assert runs["float16"][0]["reward/mean"] < 0.3 and abs(last["float16"] - last["bfloat16"]) < 0.15, last
    k3 = {precision: statistics.median(row["mismatch/k3"] for row in rows) for precision, rows in runs.items()}
    assert k3["float16"] < k3["bfloat16"] / 10, k3
    assert all(row["loss/overflows"] == 0 and row["loss/scale"] == 2.0**16 for row in runs["float16"])
