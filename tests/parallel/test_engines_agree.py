"""The real SGLang server and megatron-core compute the same, before and after weights travel, from every layout."""

from __future__ import annotations

import asyncio

import layout_work
import numpy as np
import pytest
import torch.distributed as dist
from test_layout_parity import LAYOUTS

from vespo_megatron.data.batch import Batch
from vespo_megatron.data.sample import Sample
from vespo_megatron.megatron.micro_batch import layouts, prepare
from vespo_megatron.megatron.policy import RouteUse
from vespo_megatron.routing_replay.table import slice_routes

pytestmark = pytest.mark.sglang
LENGTHS = ((5, 12), (3, 1), (30, 60), (1, 7), (9, 20), (14, 33), (2, 2), (21, 16))


def served(store: str, recipe, layout: dict, urls: list[str], version: int) -> dict | None:
    """Move the weights, send them to the server, let it generate, and score its samples with the trainer."""
    folder = recipe.policy.model_name
    policy = layout_work.build(folder, layout, store)
    policy.optimizer.param_groups[0]["lr"] = 0.01
    generator = np.random.default_rng(version)
    policy.update(layout_work.micro_batches(policy, layout_work.ragged_batch(version)), layout_work.weighted_loss)
    shared: list = [None, None]
    if policy.rank_info.rank == 0:
        shared = list(_generate(policy, recipe, urls, version, generator))
    else:
        for _ in policy.exporter.stream():
            pass
    dist.broadcast_object_list(shared, src=0)
    samples, checksum = shared
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
    pairs = zip(outputs, batches, strict=True) if outputs else ()  # the last stage has them
    gaps = [float((out[0] - each.behavior_log_probs).abs().max()) for out, each in pairs if out.numel()]
    return {"gap": max(gaps, default=0.0), "compared": compared, "differing": differing, "checksum": checksum}


def _generate(policy, recipe, urls, version, generator):
    from vespo_megatron.rollout_sglang import connect
    from vespo_megatron.rollout_sglang.engine import GenerationRequest, SamplingParams

    engine = connect(recipe, urls)
    try:
        checksum = engine.update_weights(policy.exporter.stream(), version)
        requests = [
            GenerationRequest(f"r{i}", tuple(generator.integers(2, 126, prompt).tolist()), SamplingParams(response))
            for i, (prompt, response) in enumerate(LENGTHS)
        ]
        results = asyncio.run(engine.generate(requests))
    finally:
        engine.close()
    samples = []
    for request, result in zip(requests, results, strict=True):
        assert set(result.weight_versions.tolist()) == {version}
        samples.append(
            Sample(
                sample_id=request.request_id,
                prompt_id=request.request_id,
                prompt_ids=request.prompt_ids,
                response_ids=result.output_ids,
                behavior_log_probs=result.behavior_log_probs,
                weight_versions=result.weight_versions,
                finish_reason=result.finish_reason,
                routes=result.routes,
                route_versions=result.route_versions,
            )
        )
    return samples, checksum


CASES = [(name, "distributed") for name in ("one", "tp2_sp", "ep2", "tp2_ep2", "pp2", "pp2_ep2", "tp2_cp2")]
CASES += [(name, transport) for name in ("tp2_sp", "ep2", "pp2_ep2", "tp2_cp2") for transport in ("tensor", "disk")]


@pytest.mark.parametrize(("name", "transport"), CASES)
def test_the_server_and_the_trainer_agree_after_new_weights(
    name, transport, workers, sglang_servers, tiny_recipe, tmp_path
):
    """Log-probs within 1e-4 and every route identical, in float32, with weights neither has seen before."""
    uneven = {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 2}  # three layers
    shapes = LAYOUTS | {"one": (1, {}), "pp2": (2, uneven), "pp2_ep2": (4, uneven | {"expert_model_parallel_size": 2})}
    world_size, layout = shapes[name]
    version = 10 + CASES.index((name, transport))
    recipe = tiny_recipe.with_values(
        {
            "policy.generation.sglang_cfg.weight_transport": transport,
            "policy.generation.sglang_cfg.weight_folder": str(tmp_path / "weights"),
        }
    )
    answers = workers.run(served, world_size, recipe=recipe, layout=layout, urls=sglang_servers.urls, version=version)
    gap, compared = max(answer["gap"] for answer in answers), sum(answer["compared"] for answer in answers)
    differing = sum(answer["differing"] for answer in answers)
    print(f"{name}, {transport}: log-probs within {gap:.1e}, {differing} of {compared} routes differ")
    assert len({answer["checksum"] for answer in answers}) == 1
    assert gap <= 1e-4
    assert compared > 0 and differing == 0
