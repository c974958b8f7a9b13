"""Asynchronous runs as a whole: no token beyond the bound, every group accounted for, in each mode, through kills."""

from __future__ import annotations

import json
import random

import pytest
import resume_work
from group_record import check_groups, write_groups_down

from vespo_megatron.recipe.loader import load_recipe, save_recipe
from vespo_megatron.run.checkpoint_store import CheckpointStore
from vespo_megatron.run.metrics_file import read_metrics
from vespo_megatron.run.run_directory import RECIPE_FILE
from vespo_megatron.trainer.checkpoint import TRAINER

STEPS, PROMPTS = 12, 2
pytestmark = pytest.mark.timeout(600)


def make_run(folder, name, *overrides):
    return resume_work.make_run(
        folder,
        name,
        f"grpo.max_num_steps={STEPS}",
        f"grpo.num_prompts_per_step={PROMPTS}",
        "grpo.num_generations_per_prompt=4",
        "policy.train_global_batch_size=8",
        "grpo.async_grpo.enabled=true",
        *overrides,
    )


def check(run_dir, bound, steps=STEPS):
    """Bound, accounts and steps; returns the rows."""
    rows = read_metrics(run_dir)
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    for row in rows:
        assert row["staleness/lag_max"] <= bound
        held = row["staleness/under_way"] + row["staleness/waiting"]
        ended = row["staleness/trained"] + row["staleness/aborted"] + row["staleness/expired"]
        assert row["staleness/sent"] == ended + held, row
        assert row["staleness/trained"] == row["step"] * PROMPTS
        tokens = sum(row[f"staleness/tokens_lag_{lag}"] for lag in range(bound + 1))
        assert tokens == row["response/tokens"]
    return rows


def test_killed_and_resumed_every_group_is_trained_once_and_every_token_scored_by_its_version(importable):
    """In float32 the two engines agree to rounding: π_old is μ where it is of the weights that drew the token.

    Of two steps a version, the second is trained on by weights that no version has.
    """
    chance = random.Random(3)
    run_dir = make_run(
        importable,
        "killed",
        "checkpointing.save_period=1",
        "grpo.async_grpo.max_staleness=2",
        "grpo.async_grpo.sync_every=2",
        "loss_fn.behavior=version",
        "policy.megatron_cfg.optimizer.lr=3e-3",
    )
    for phase, step in (("train", 3), ("checkpoint write", 5), ("generate", 8)):
        resume_work.kill_in(run_dir, resume_work.start(run_dir, write_groups_down), phase, step, chance)
    resume_work.finish(run_dir, write_groups_down)
    rows = check(run_dir, bound=2)
    check_groups(run_dir, STEPS)
    assert max(row["staleness/lag_max"] for row in rows) > 0, "it was synchronous"
    assert rows[-1]["staleness/drawn_again"] > 0
    assert max(row["staleness/versions"] for row in rows) > 1
    assert max(row["staleness/held_versions"] for row in rows) == 3
    assert max(row["mismatch/prob_diff_max"] for row in rows) < 1e-5, "scored by other weights than drew it"
    assert max(row["staleness/k3"] for row in rows) > 0.01, "the weights hardly moved"


def test_resumed_between_two_versions_the_weights_have_a_number_of_their_own_and_lags_are_as_scheduled(importable):
    """Of two steps a version, the run ends after its third and goes on with weights that no version has had."""
    run_dir = make_run(
        importable,
        "resumed",
        "checkpointing.save_period=1",
        "grpo.async_grpo.max_staleness=1",
        "grpo.async_grpo.sync_every=2",
        "loss_fn.behavior=rollout",
        "policy.router_replay.mode=R2",
        "policy.megatron_cfg.optimizer.lr=3e-3",
    )
    recipe = load_recipe(run_dir / RECIPE_FILE)
    found = []
    for steps in (3, STEPS):
        save_recipe(recipe.with_values({"grpo.max_num_steps": steps}), run_dir / RECIPE_FILE)
        resume_work.finish(run_dir)
        newest = next(iter(CheckpointStore(run_dir / "checkpoints").checkpoints().values()))
        facts = json.loads((newest / TRAINER).read_text())
        found.append((facts["weight_version"], facts["engine_is_behind"]))
    assert found == [(1, True), (STEPS // 2 + 1, False)]
    rows = check(run_dir, bound=1)
    # R2's routes are those of the weights that train on the batch, however old it is; the engine's are of older ones.
    assert {row["routes/drift_agreement"] for row in rows} == {1.0}
    assert min(row["routes/agreement"] for row in rows) < 1.0


@pytest.mark.nightly
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("mode", ["abort_and_continue", "in_place"])
def test_killed_at_twenty_random_moments_no_group_is_trained_twice_or_lost(mode, importable):
    """With R3, responses long enough for new weights to come in their middle, and a buffer of several versions."""
    chance, steps = random.Random(mode), 44
    run_dir = make_run(
        importable,
        mode,
        f"grpo.max_num_steps={steps}",
        f"grpo.async_grpo.on_weight_update={mode}",
        "grpo.async_grpo.max_staleness=2",
        "checkpointing.save_period=1",
        "policy.router_replay.mode=R3",
        "policy.generation.max_new_tokens=100",
        "policy.max_total_sequence_length=128",
    )
    killed = 0
    for number in range(20):
        phase = chance.choice(["generate", "train", "checkpoint write", "sync_weights"])
        process = resume_work.start(run_dir, write_groups_down)
        killed += bool(resume_work.kill_in(run_dir, process, phase, 2 * number + 1, chance))
    resume_work.finish(run_dir, write_groups_down)
    assert killed == 20
    rows = check(run_dir, bound=2, steps=steps)
    check_groups(run_dir, steps)
    assert sum(row["staleness/partial_share"] for row in rows) > 0
    assert {row["rollout/stale_routes"] for row in rows} == {0.0} and rows[-1]["staleness/drawn_again"] > 0


@pytest.mark.nightly
@pytest.mark.sglang
@pytest.mark.timeout(3000)
def test_killed_five_times_beside_sglang_s_real_server_no_group_is_trained_twice_or_lost(importable, sglang_servers):
    chance = random.Random(5)
    run_dir = make_run(
        importable,
        "beside_sglang",
        "policy.generation.backend=sglang",
        f"policy.generation.sglang_cfg.urls={sglang_servers.urls}",
        "policy.generation.sglang_cfg.enable_return_routed_experts=true",
        "policy.generation.sglang_cfg.weight_bucket_bytes=65536",
        "grpo.async_grpo.max_staleness=2",
        "checkpointing.save_period=1",
        "policy.router_replay.mode=R3",
        "policy.generation.max_new_tokens=60",
        "policy.max_total_sequence_length=128",
    )
    for number, phase in enumerate(("generate", "train", "checkpoint write", "sync_weights", "generate")):
        process = resume_work.start(run_dir, write_groups_down)
        assert resume_work.kill_in(run_dir, process, phase, 2 * number + 1, chance)
    resume_work.finish(run_dir, write_groups_down)
    rows = check(run_dir, bound=2)
    check_groups(run_dir, STEPS)
    assert sum(row["staleness/partial_share"] for row in rows) > 0
    assert {row["rollout/stale_routes"] for row in rows} == {0.0}


def test_in_place_every_route_is_replayed_and_none_is_stale(importable):
    run_dir = make_run(
        importable,
        "in_place",
        "grpo.async_grpo.on_weight_update=in_place",
        "grpo.async_grpo.max_staleness=2",
        "policy.megatron_cfg.optimizer.lr=3e-3",
        "policy.router_replay.mode=R3",
        "policy.generation.max_new_tokens=100",
        "policy.max_total_sequence_length=128",
    )
    resume_work.finish(run_dir)
    rows = check(run_dir, bound=2)
    assert sum(row["staleness/partial_share"] for row in rows) > 0
    assert {row["staleness/interruptions"] for row in rows} == {row["rollout/stale_routes"] for row in rows} == {0.0}


@pytest.mark.sglang
@pytest.mark.parametrize("mode", ["abort_and_continue", "in_place", "drain"])
def test_with_sglang_s_real_server_in_each_mode(mode, importable, sglang_servers):
    run_dir = make_run(
        importable,
        mode,
        "policy.generation.backend=sglang",
        f"policy.generation.sglang_cfg.urls={sglang_servers.urls}",
        f"grpo.async_grpo.on_weight_update={mode}",
        "loss_fn.behavior=version",
        "grpo.async_grpo.staleness_threshold=1.5",
        "policy.generation.max_new_tokens=24",
        "policy.max_total_sequence_length=128",
        "policy.generation.sglang_cfg.weight_bucket_bytes=65536",
        "policy.router_replay.mode=R3",
        "policy.router_replay.on_stale_routes=error",
        "policy.generation.sglang_cfg.enable_return_routed_experts=true",
    )
    resume_work.finish(run_dir)
    rows = check(run_dir, bound=2)
    assert max(row["staleness/lag_max"] for row in rows) > 0
    partial = sum(row["staleness/partial_share"] for row in rows)
    interrupted = sum(row["staleness/interruptions"] for row in rows)
    assert (partial == 0) == (mode == "drain"), partial
    assert (interrupted > 0) == (mode == "abort_and_continue"), interrupted
    assert max(row["staleness/versions"] for row in rows) > 1
    if mode != "in_place":  # whose cache is of mixed weights
        assert max(row["mismatch/prob_diff_max"] for row in rows) < 1e-4, "scored by other weights than drew it"
