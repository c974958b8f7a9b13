"""However an asynchronous run with evaluations ends, it goes on with all of them, and its best checkpoint is there."""

from __future__ import annotations

import json
import random

import pytest
import resume_work
from command_line import ROW, SPREAD

from vespo_megatron.run.checkpoint_store import CheckpointStore
from vespo_megatron.run.metrics_file import evaluated_steps, read_metrics

STEPS, EVERY = 8, 2
METRIC = "eval/held_out/avg@2"
MOMENTS = ("generate", "train", "sync_weights", "checkpoint", "checkpoint write", "evaluate", "step")
SLOW = "import time\ndef slow(source, text, truth, extra):\n    time.sleep(0.06 * (source == 'held out'))\n"
SLOW += "    return float(sum(map(ord, text)) % 97)\n"
pytestmark = pytest.mark.timeout(1200)


def make_run(folder, name, *overrides):
    """An evaluation of a second or so every second step, which take less, and a checkpoint at each."""
    (folder / "rewards_of_mine.py").write_text(SPREAD + SLOW)
    held_out = ROW | {"data_source": "held out"}
    (folder / "held_out.jsonl").write_text("".join(json.dumps(held_out) + "\n" for _ in range(6)))
    return resume_work.make_run(
        folder,
        name,
        "env.reward=rewards_of_mine:slow",
        "env.num_workers=1",
        f"data.validation.path={folder}/held_out.jsonl",
        f"grpo.max_num_steps={STEPS}",
        "grpo.num_prompts_per_step=2",
        "grpo.num_generations_per_prompt=4",
        f"grpo.val_period={EVERY}",
        "grpo.val_num_generations=2",
        "policy.train_global_batch_size=8",
        "policy.megatron_cfg.optimizer.lr=3e-3",
        "grpo.async_grpo.enabled=true",
        "checkpointing.save_period=1",
        "checkpointing.keep_top_k=1",
        f"checkpointing.metric_name={METRIC}",
        *overrides,
    )


def check(run_dir):
    """Every evaluation is there, once, problem by problem, and so is the best checkpoint."""
    rows = read_metrics(run_dir)
    due = [step for step in range(STEPS + 1) if step % EVERY == 0]
    assert sorted(evaluated_steps(rows)) == due
    assert sorted(path.name for path in (run_dir / "evaluations").iterdir()) == [f"step_{n:06d}.jsonl" for n in due]
    scores = {row["step"]: row[METRIC] for row in rows if row["step"] in due[1:]}  # 0 is before the first checkpoint
    best = max(reversed(scores), key=lambda step: scores[step])
    assert sorted(CheckpointStore(run_dir / "checkpoints").checkpoints()) == sorted({best, STEPS}), scores
    return rows


def after_kills(run_dir, kills, seed):
    chance, hit = random.Random(seed), []
    while len(hit) < kills:
        moment, step = chance.choice(MOMENTS), 1 + len(hit) * STEPS // kills
        if where := resume_work.kill_in(run_dir, resume_work.start(run_dir), moment, step, chance):
            hit.append(where)
        elif (run_dir / "checkpoints" / "final_hf").exists():
            break
    resume_work.finish(run_dir)
    check(run_dir)
    assert len(hit) == kills, hit


def test_evaluations_that_end_together_are_told_of_each_and_judge_its_checkpoint(importable):
    run_dir = make_run(importable, "whole")
    resume_work.finish(run_dir)
    rows = check(run_dir)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) > len(rows), "no evaluation ended after its step: they were not beside training"
    assert all(row["eval/begun_after_step"] == row["step"] for row in rows if METRIC in row)


def test_five_kills(importable):
    after_kills(make_run(importable, "killed"), kills=5, seed=1)


@pytest.mark.nightly
def test_twenty_kills(importable):
    for number in range(4):
        after_kills(make_run(importable, f"killed_{number}"), kills=5, seed=10 + number)


def test_what_a_stop_cuts_short_is_drawn_at_the_resume(importable):
    """Asked to stop in the step after an evaluation has begun."""
    run_dir = make_run(importable, "stopped")
    process = resume_work.start(run_dir)
    resume_work.wait_for_step(run_dir, process, EVERY + 1)
    (run_dir / "stop").touch()
    process.join(600)
    assert process.exitcode == 0
    stopped = json.loads((run_dir / "stopped.json").read_text())
    assert EVERY not in evaluated_steps(read_metrics(run_dir)), "it had ended before the stop"
    for name in ("stop", "stopped.json"):
        (run_dir / name).unlink()
    resume_work.finish(run_dir)
    rows = check(run_dir)
    (redrawn,) = (row for row in rows if row["step"] == EVERY)
    assert redrawn["eval/begun_after_step"] == stopped["step"]
