"""The in-process rollout engine on the device: what it draws, its log-probs against the trainer's, and an update."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from gpu_policy import VOCAB, by_sample, linear_loss, make_batch, make_policy, micro_batches, weights

from vespo_megatron.data.batch import Batch
from vespo_megatron.data.sample import Sample
from vespo_megatron.megatron import micro_batch as prepared
from vespo_megatron.megatron.policy import RouteUse
from vespo_megatron.rollout_sglang.engine import GenerationRequest, SamplingParams
from vespo_megatron.rollout_sglang.in_process.engine import InProcessEngine
from vespo_megatron.rollout_sglang.in_process.mismatch import EngineMismatch
from vespo_megatron.routing_replay.table import slice_routes


@pytest.fixture
def engine(device, tiny_folder, request):
    made = InProcessEngine(tiny_folder, device=device, **getattr(request, "param", {}))
    yield made
    made.close()


def requests(count: int = 12, tokens: int = 24, **sampling) -> list[GenerationRequest]:
    generator = np.random.default_rng(3)
    prompts = [tuple(generator.integers(0, VOCAB, size=generator.integers(1, 30)).tolist()) for _ in range(count)]
    params = SamplingParams(max_new_tokens=tokens, stop_token_ids=(5,), **sampling)
    return [GenerationRequest(f"r{i}", prompts[i // 2], params, seed=i) for i in range(count)]


def samples(asked, results) -> Batch:
    made = [
        Sample(
            sample_id=request.request_id,
            prompt_id="p",
            prompt_ids=np.array(request.prompt_ids),
            response_ids=result.output_ids,
            behavior_log_probs=result.behavior_log_probs,
            weight_versions=result.weight_versions,
            finish_reason=result.finish_reason,
            routes=result.routes,
            route_versions=result.route_versions,
            sampling_mask=result.sampling_mask,
        )
        for request, result in zip(asked, results, strict=True)
    ]
    return Batch(made, np.zeros(len(made), dtype=np.float32))


def scored(policy, batch: Batch, temperature: float, *, replay: bool = False) -> dict[str, torch.Tensor]:
    batches = prepared.prepare([batch], policy.rank_info, temperature=temperature, log_prob_bytes=1 << 14)
    use = RouteUse()
    if replay:
        for each in batches:
            each.engine_routes = slice_routes(batch.samples, each.layout, policy.moe_layers, topk=2, num_experts=8)
        use = RouteUse("replay", lambda each: (each.engine_routes, None))
    return by_sample(batches, policy.log_probs(batches, routes=use))


SAMPLING = {
    "all tokens": {"temperature": 0.8},
    "greedy": {"temperature": 0.0},
    "some tokens": {"temperature": 1.0, "top_p": 0.7, "top_k": 20},
}


@pytest.mark.parametrize("how", SAMPLING)
def test_its_log_probs_are_the_trainers(how, device, engine, rank_info, tiny_folder, close):
    assert engine._model.device == device and engine._model.cos.device == device
    policy = make_policy(tiny_folder, rank_info)
    asked = requests(**SAMPLING[how])
    batch = samples(asked, asyncio.run(engine.generate(asked)))
    found = scored(policy, batch, SAMPLING[how]["temperature"] or 1.0)
    assert sum(len(sample.response_ids) for sample in batch.samples) > 50
    for sample in batch.samples:
        close(sample.sample_id, found[sample.sample_id][0], torch.from_numpy(sample.behavior_log_probs), 1e-5)


@pytest.mark.parametrize(
    ("engine", "bound"), [({"dtype": torch.bfloat16}, 0.02), ({"dtype": torch.float16}, 0.003)], indirect=["engine"]
)
def test_in_16_bits_they_are_near(engine, bound, rank_info, tiny_folder, note):
    """With the engine's routes (R3): without them a token whose experts flip is far off."""
    policy = make_policy(tiny_folder, rank_info, str(engine._model.dtype)[6:])
    asked = requests(tokens=40, temperature=1.0)
    batch = samples(asked, asyncio.run(engine.generate(asked)))
    found = scored(policy, batch, 1.0, replay=True)
    apart = torch.cat(
        [(found[s.sample_id][0].cpu() - torch.from_numpy(s.behavior_log_probs)).abs() for s in batch.samples]
    )
    note(**{"median |log π − log μ|": float(apart.median())})
    note(**{"largest |log π − log μ|": float(apart.max())})
    assert apart.isfinite().all() and apart.median() < bound, float(apart.median())


def test_the_same_seed_draws_the_same_response(engine):
    asked = requests(temperature=1.0)
    first, again = (asyncio.run(engine.generate(asked)) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert np.array_equal(one.output_ids, other.output_ids), one.request_id
    assert len({tuple(result.output_ids.tolist()) for result in first}) > len(first) // 2


def test_it_takes_new_weights(engine, rank_info, tiny_folder, close):
    policy = make_policy(tiny_folder, rank_info, **{"optimizer.lr": 0.02})
    batches = micro_batches(policy, make_batch())
    policy.update(batches, linear_loss)
    engine.update_weights(policy.exporter.stream(), 1)
    assert engine.weight_version == 1 and len(engine._views) == len(weights(policy))
    asked = requests(temperature=1.0)
    batch = samples(asked, asyncio.run(engine.generate(asked)))
    found = scored(policy, batch, 1.0)
    for sample in batch.samples:
        close(sample.sample_id, found[sample.sample_id][0], torch.from_numpy(sample.behavior_log_probs), 1e-5)


NOISY = EngineMismatch("fp8_e4m3", "fp8_e4m3", route_flip=0.2, log_prob_noise=0.05, seed=1)


@pytest.mark.parametrize("engine", [{"mismatch": NOISY}], indirect=True)
def test_its_mismatch_dials_turn_on_the_device(engine):
    results = asyncio.run(engine.generate(requests(temperature=1.0)))
    assert all(np.isfinite(result.behavior_log_probs).all() for result in results)
    assert all((result.behavior_log_probs <= 0).all() for result in results)
