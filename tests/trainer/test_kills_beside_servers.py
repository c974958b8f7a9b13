"""kill -9 of a trainer at any moment, beside real servers that live on: whoever comes next takes them over."""

from __future__ import annotations

import random

import pytest
import resume_work

from vespo_megatron.recipe.loader import load_recipe
from vespo_megatron.rollout_sglang import connect, launch_servers
from vespo_megatron.run.metrics_file import read_metrics
from vespo_megatron.run.run_directory import RECIPE_FILE

STEPS = 6
MOMENTS = ("generate", "train", "sync_weights", "sync_weights", "checkpoint", "step", "set-up")
"""An update of the weights twice: it leaves the servers paused, in the middle of it."""
SERVERS = "policy.generation.sglang_cfg"
pytestmark = [pytest.mark.sglang, pytest.mark.timeout(3000)]


def make_run(folder, name, asynchronous, urls):
    return resume_work.make_run(
        folder,
        name,
        f"grpo.max_num_steps={STEPS}",
        "grpo.num_prompts_per_step=2",
        "grpo.num_generations_per_prompt=4",
        "policy.train_global_batch_size=8",
        "policy.generation.backend=sglang",
        f"{SERVERS}.urls={urls}",
        f"{SERVERS}.weight_update_timeout=60",
        f"grpo.async_grpo.enabled={asynchronous}",
        "checkpointing.save_period=1",
        "checkpointing.keep_top_k=2",
    )


@pytest.fixture(scope="module")
def urls(tmp_path_factory, tiny_qwen3_moe_folder):
    """Two servers, which no trainer here ends."""
    from command_line import make_folder

    folder = make_folder(tmp_path_factory.mktemp("servers"), tiny_qwen3_moe_folder)
    run_dir = make_run(folder, "servers", False, [])
    recipe = load_recipe(run_dir / RECIPE_FILE).with_values({f"{SERVERS}.num_servers": 2})
    with launch_servers(recipe, run_dir) as servers:
        yield servers.urls


def go_on_after_kills(folder, urls, *, asynchronous, kills, seed):
    chance, hit, number = random.Random(seed), [], 0
    while len(hit) < kills:
        run_dir = make_run(folder, f"killed_{number}", asynchronous, urls)
        number += 1
        for moment in chance.sample(MOMENTS, k=min(4, kills - len(hit))):
            where = resume_work.kill_in(run_dir, resume_work.start(run_dir), moment, chance.randint(0, 3), chance)
            if not where:  # it has come to its end
                break
            hit.append(f"{moment}: {where}")
        resume_work.finish(run_dir)
        rows = read_metrics(run_dir)
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1)), hit
        assert all(row["rollout/servers"] == 2 for row in rows), "a server was locked out"
    engine = connect(load_recipe(run_dir / RECIPE_FILE), urls)
    assert len(engine.pool.membership.serving) == 2
    engine.close()
    print("\n".join(hit))


@pytest.mark.slow
def test_two_kills(importable, urls):
    go_on_after_kills(importable, urls, asynchronous=False, kills=2, seed=1)


@pytest.mark.nightly
@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
def test_twenty_kills(importable, urls, asynchronous):
    go_on_after_kills(importable, urls, asynchronous=asynchronous, kills=20, seed=2)
