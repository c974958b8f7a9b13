"""Three turns with tool output between them: at equal weights W is 1, routes are the same, and the mask fits."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import layout_work
import numpy as np
import pytest
import torch.distributed as dist
from test_layout_parity import LAYOUTS

from vespo_megatron.controller.sampler import to_sample
from vespo_megatron.controller.turns import TurnLoop
from vespo_megatron.data.batch import Batch
from vespo_megatron.data.prompt_set import PromptRecord
from vespo_megatron.environments import EnvironmentPool
from vespo_megatron.losses import compute_ratios
from vespo_megatron.megatron.micro_batch import layouts, prepare
from vespo_megatron.megatron.policy import RouteUse
from vespo_megatron.recipe.schema import LossConfig
from vespo_megatron.rollout_sglang.engine import GenerationRequest, SamplingParams
from vespo_megatron.routing_replay.table import slice_routes
from vespo_megatron.trainer.objective import Objective

TURNS, RESPONSES = 3, 16
STOPS = tuple(range(1, 24))
"""Enough of 128 tokens for turns of a few tokens each, of a random model."""


class ToolOutput:
    """Answers a turn with as many tokens as that has, and one more; three turns."""

    def reset(self, record):
        pass

    def step(self, turn):
        return said(turn.token_ids), 0.0, turn.number + 1 >= TURNS


def said(turn_ids):
    return [30 + (7 * token + place) % 90 for place, token in enumerate((*turn_ids, 5))]


class NoTokenizer:
    """Tokens have no text here."""

    chat_template = None

    def decode(self, ids, **kwargs):
        return ""


def draw(recipe, engine, generator):
    """Samples by the turn loop, and the response and mask that each must have, put together from the engine's calls."""
    drawn = {}

    async def generate(requests):
        results = await engine.generate(requests)
        for request, result in zip(requests, results, strict=True):
            drawn.setdefault(request.request_id.partition("/")[0], []).append(result.output_ids.tolist())
        return results

    records = [
        PromptRecord(f"p{number}", tuple(generator.integers(2, 126, 3 + number).tolist()), "s", "")
        for number in range(RESPONSES)
    ]
    requests = [
        GenerationRequest(f"r{number}", each.prompt_ids, SamplingParams(60, stop_token_ids=STOPS), seed=number)
        for number, each in enumerate(records)
    ]
    pool = EnvironmentPool(recipe.env)
    dialogues = asyncio.run(TurnLoop(recipe, NoTokenizer(), pool, generate).draw(requests, records))
    samples, expected = [], []
    for dialogue, each in zip(dialogues, records, strict=True):
        samples.append(to_sample(dialogue, each))
        turns = drawn[dialogue.result.request_id]
        ids, mask = list(turns[0]), [True] * len(turns[0])
        for before, after in pairwise(turns):
            ids += [*said(before), *after]
            mask += [False] * len(said(before)) + [True] * len(after)
        expected.append((ids, mask, len(turns)))
    return samples, expected


def scored(store: str, recipe, layout: dict, urls: list[str], version: int) -> dict:
    """New weights go to the engine, it draws in turns, and the trainer scores what it drew."""
    policy = layout_work.build(recipe.policy.model_name, layout, store)
    policy.optimizer.param_groups[0]["lr"] = 0.01
    policy.update(layout_work.micro_batches(policy, layout_work.ragged_batch(version)), layout_work.weighted_loss)
    shared: list = [None]
    if policy.rank_info.rank == 0:
        shared = [_drawn(policy, recipe, urls, version)]
    else:
        for _ in policy.exporter.stream():
            pass
    dist.broadcast_object_list(shared, src=0)
    samples, expected = shared[0]
    mine = samples[policy.rank_info.data_rank :: policy.rank_info.data_size]
    parts = [Batch(mine[i::2], np.zeros(len(mine[i::2]), np.float32)) for i in range(2)]
    tables = [
        slice_routes(part.samples, where, policy.moe_layers, topk=2, num_experts=8)
        for part, where in zip(parts, layouts(parts, policy.rank_info), strict=True)
    ]
    batches = prepare(parts, policy.rank_info, temperature=1.0, log_prob_bytes=4096, routes=tables)
    for each in batches:
        each.trainer_routes = policy.empty_routes(each)
    outputs = policy.log_probs(batches, routes=RouteUse("record", lambda each: (each.trainer_routes, None)))
    compared = differing = 0
    for each in batches:
        rows = each.layout.is_real[each.layout.sequence_parallel_slice] & each.engine_routes.recorded
        ours, theirs = np.sort(each.trainer_routes.experts[rows]), np.sort(each.engine_routes.experts[rows])
        compared, differing = compared + ours[..., 0].size, differing + int((ours != theirs).any(-1).sum())
    objective = Objective(LossConfig(name="vespo"), "rollout")
    log_w, gaps, unmasked = [], [0.0], []
    for out, each in zip(outputs, batches, strict=True) if outputs else ():  # the last stage has them
        ratios = compute_ratios(objective._inputs(out[0], out[1], each), objective.config)
        log_w += ratios.sequence_log_ratio.tolist()
        gap = (out[0] - each.behavior_log_probs).abs()
        gaps += gap[each.mask].tolist()
        unmasked += gap[~each.mask].tolist()
    return {
        "samples": [(s.response_ids.tolist(), s.loss_mask.tolist(), len(s.turn_rewards)) for s in samples],
        "expected": expected,
        "rows": [len(s.routes) - s.num_tokens for s in samples],
        "log_w": log_w,
        "gap": max(gaps),
        "unmasked": unmasked,
        "compared": compared,
        "differing": differing,
    }


def _drawn(policy, recipe, urls, version):
    from vespo_megatron.rollout_sglang import connect
    from vespo_megatron.rollout_sglang.in_process.engine import InProcessEngine

    in_process = recipe.policy.generation.backend == "in_process"
    engine = InProcessEngine(recipe.policy.model_name, context_length=128) if in_process else connect(recipe, urls)
    try:
        engine.update_weights(policy.exporter.stream(), version)
        return draw(recipe, engine, np.random.default_rng(version))
    finally:
        engine.close()


def check(workers, recipe, name, urls, version):
    world_size, layout = ({"one": (1, {})} | LAYOUTS)[name]
    values = {"env.class": f"{__name__}:ToolOutput", "env.num_environments": 0, "policy.max_total_sequence_length": 128}
    answers = workers.run(
        scored, world_size, recipe=recipe.with_values(values), layout=layout, urls=urls, version=version
    )
    first = answers[0]
    assert first["samples"] == first["expected"], "tokens and loss mask, one by one"
    assert sum(turns == TURNS for _, _, turns in first["expected"]) > RESPONSES / 2
    assert first["rows"] == [-1] * RESPONSES, "a row for every token but the last, observed ones too"
    log_w = np.array([each for answer in answers for each in answer["log_w"]])
    gap = max(answer["gap"] for answer in answers)
    compared, differing = (sum(answer[key] for answer in answers) for key in ("compared", "differing"))
    print(f"{name}: |W − 1| at most {np.abs(np.expm1(log_w)).max():.1e}, log-probs within {gap:.1e}")
    print(f"{name}: {differing} of {compared} routes differ")
    assert len(log_w) >= RESPONSES and np.abs(np.expm1(log_w)).max() <= 1e-4 and gap <= 1e-4
    assert compared > 0 and differing == 0
    outside = [each for answer in answers for each in answer["unmasked"]]
    assert len(outside) > 100 and np.mean(outside) > 1, "what is observed has log-probs that nobody drew"


@pytest.mark.parametrize("name", ["one", "tp2_ep2", "tp2_cp2"])
def test_with_the_in_process_engine_w_is_one_over_three_turns_on_every_layout(name, workers, tiny_recipe):
    recipe = tiny_recipe.with_values({"policy.generation.backend": "in_process"})
    check(workers, recipe, name, [], 5)


@pytest.mark.sglang
def test_with_sglang_s_server_w_is_one_over_three_turns(workers, tiny_recipe, sglang_servers):
    check(workers, tiny_recipe, "one", sglang_servers.urls, 71)
