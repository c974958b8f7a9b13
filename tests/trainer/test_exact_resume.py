"""kill -9 at any moment, then the same command again: metrics and weights to the last bit as if nothing had been."""

from __future__ import annotations

import json
import os
import random

import pytest
import resume_work

from vespo_megatron.run.metrics_file import read_metrics

STEPS = 6
MOMENTS = ("generate", "old_log_probs", "train", "sync_weights", "checkpoint", "checkpoint write", "step", "set-up")
TIMES = ("wall_time", "time/", "memory/", "throughput/", "checkpoint/")
pytestmark = pytest.mark.timeout(1200)


def make_run(folder, name, more=()):
    """The run directory of a recipe with everything that has state: schedule, epochs, reference, recompute pass."""
    return resume_work.make_run(
        folder,
        name,
        f"grpo.max_num_steps={STEPS}",
        "grpo.num_prompts_per_step=3",
        "grpo.num_generations_per_prompt=4",
        "policy.train_global_batch_size=4",
        "loss_fn.behavior=recompute",
        "loss_fn.reference_policy_kl_penalty=0.01",
        "policy.megatron_cfg.scheduler.lr_decay_style=cosine",
        "policy.megatron_cfg.scheduler.lr_warmup_iters=3",
        "policy.megatron_cfg.optimizer.lr=3e-3",
        "checkpointing.save_period=1",
        "checkpointing.keep_top_k=2",
        *more,
    )


def outcome(run_dir):
    """(metrics of every step but times, bytes of the final weights)."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert rows == read_metrics(run_dir), "a step twice, or out of order"
    kept = [{name: value for name, value in row.items() if not name.startswith(TIMES)} for row in rows]
    return kept, (run_dir / "checkpoints" / "final_hf" / "model-00001.safetensors").read_bytes()


def resume_after_kills(folder, monkeypatch, kills, seed, more=()):
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    monkeypatch.syspath_prepend(folder)
    chance = random.Random(seed)
    whole = make_run(folder, "whole", more)
    resume_work.finish(whole)
    expected = outcome(whole)
    assert [row["step"] for row in expected[0]] == list(range(1, STEPS + 1))
    assert any(row["loss/grad_norm"] > 0 for row in expected[0]), "nothing was trained"
    hit = []
    number = 0
    while len(hit) < kills:
        run_dir = make_run(folder, f"killed_{number}", more)
        number += 1
        moments = chance.sample(MOMENTS, k=len(MOMENTS))
        for moment in moments[: min(4, kills - len(hit))]:  # several kills in one run
            where = resume_work.kill_in(run_dir, resume_work.start(run_dir), moment, chance.randint(0, 3), chance)
            if where:
                hit.append(f"{moment}: {where}")
        resume_work.finish(run_dir)
        assert outcome(run_dir) == expected, hit
    print("\n".join(hit))


def test_four_kills(folder, monkeypatch):
    resume_after_kills(folder, monkeypatch, kills=4, seed=1)


@pytest.mark.nightly
def test_twenty_kills(folder, monkeypatch):
    resume_after_kills(folder, monkeypatch, kills=20, seed=2)


@pytest.mark.nightly
def test_ten_kills_over_two_sets_by_weight_with_a_reward_each(folder, monkeypatch):
    """Metrics hang on every prompt's turn: each set has epochs of its own, and rewards of its own kind."""
    (folder / "another_reward.py").write_text(
        "def many(data_source, solution_str, ground_truth, extra_info):\n"
        "    return {'score': len(solution_str.split()) % 3, 'of_words': 1.0}\n"
    )
    for name, count in (("sums", 11), ("words", 5)):
        rows = [
            {"prompt": f"{n % 10} + {n // 10} =", "data_source": name, "reward_model": {"ground_truth": str(n)}}
            for n in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = (
        "data.train.path=null",
        f"data.train.sets.sums={{path: {folder / 'sums.jsonl'}, weight: 3}}",
        f"data.train.sets.words={{path: {folder / 'words.jsonl'}, weight: 1, reward: 'another_reward:many'}}",
    )
    resume_after_kills(folder, monkeypatch, kills=10, seed=3, more=sets)
    rows = read_metrics(folder / "runs" / "whole")
    assert any("reward/of_words" in row for row in rows), "the second set was never drawn"


OVERSAMPLED = (
    "grpo.oversample=1.5",
    "grpo.partial_rollouts=true",
    "data.curriculum.rest=1",
    "data.curriculum.max_solved=0.7",
    "data.curriculum.solved_above=-1000",
    "policy.router_replay.mode=R3",
    "policy.generation.max_new_tokens=16",
    f"policy.generation.stop_token_ids={list(range(1, 64, 8))}",
)


@pytest.mark.nightly
def test_six_kills_with_responses_in_their_middle_and_prompts_that_rest(folder, monkeypatch):
    """What was ended goes on with its tokens, log-probs and routes, on the weights of the next step."""
    rows = [{"prompt": f"{n} + 1 =", "data_source": "sums", "reward_model": {"ground_truth": "1"}} for n in range(12)]
    (folder / "twelve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = (*OVERSAMPLED, f"data.train.path={folder / 'twelve.jsonl'}")
    resume_after_kills(folder, monkeypatch, kills=6, seed=4, more=more)
    rows = [row for row in read_metrics(folder / "runs" / "whole") if row["step"] > 1]
    assert all(row["rollout/carried_groups"] > 0 for row in rows) and rows[-1]["rollout/passed_over"] > 0
    assert max(row["staleness/lag_max"] for row in rows) > 0 and max(row["staleness/partial_share"] for row in rows) > 0
