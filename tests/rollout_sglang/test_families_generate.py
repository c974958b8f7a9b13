"""Both engines generate with every family of models as transformers' plain forward says."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from family_checkpoints import FAMILIES, make_family

from vespo_megatron.errors import UserError
from vespo_megatron.families.family import family_of, known_families
from vespo_megatron.recipe.model_shape import read_shape
from vespo_megatron.rollout_sglang.engine import GenerationRequest, SamplingParams
from vespo_megatron.rollout_sglang.in_process.engine import InProcessEngine
from vespo_megatron.rollout_sglang.in_process.mismatch import EngineMismatch
from vespo_megatron.rollout_sglang.server.flags import check_served, lacks_its_head

TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(folder with a tokenizer, transformers' model)."""
    folder = tmp_path_factory.mktemp(request.param)
    return folder, make_family(folder, request.param).eval()


def test_every_known_family_has_a_checkpoint():
    assert sorted(FAMILIES) == known_families()
    assert family_of("gpt2") is None and family_of("decoder") is None


def requests(count: int = 12) -> list[GenerationRequest]:
    generator = np.random.default_rng(3)
    prompts = [tuple(generator.integers(2, 126, generator.integers(1, 30)).tolist()) for _ in range(count)]
    params = SamplingParams(max_new_tokens=20, stop_token_ids=(5,))
    return [GenerationRequest(f"r{i}", prompts[i // 2], params, seed=i) for i in range(count)]


def plain_forward(model, shape, request, result):
    """Log-probs [R] and experts [P + R, MoE layers, topk] of one unpadded forward."""
    ids, experts = torch.tensor([[*request.prompt_ids, *result.output_ids.tolist()]]), []
    hooks = [
        model.model.layers[layer].mlp.gate.register_forward_hook(lambda _gate, _given, out: experts.append(out[2]))
        for layer in shape.moe_layers
    ]
    try:
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0]
    finally:
        for hook in hooks:
            hook.remove()
    taken = logits.log_softmax(-1)[len(request.prompt_ids) - 1 : -1]
    taken = taken.gather(1, torch.tensor(result.output_ids)[:, None])[:, 0]
    return taken.numpy(), torch.stack(experts, dim=1).numpy() if experts else None


def assert_as_transformers(results, family, *, tolerance: float) -> None:
    folder, model = family
    shape, longest = read_shape(folder), 0
    for request, result in zip(requests(), results, strict=True):
        log_probs, experts = plain_forward(model, shape, request, result)
        np.testing.assert_allclose(result.behavior_log_probs, log_probs, atol=tolerance)
        longest = max(longest, len(result.output_ids))
        if experts is not None:
            np.testing.assert_array_equal(np.sort(result.routes, -1), np.sort(experts[:-1], -1))
    assert longest == 20, "some response is as long as it may be"


def test_the_in_process_engine(family):
    engine = InProcessEngine(family[0])
    try:
        assert_as_transformers(asyncio.run(engine.generate(requests())), family, tolerance=1e-5)
    finally:
        engine.close()


def test_weights_by_name_reach_the_in_process_engine(family, tmp_path):
    """Half of every weight of the checkpoint, sent under its name on disk, is what the engine then has."""
    from safetensors.torch import load_file

    engine = InProcessEngine(family[0])
    try:
        sent = {name: tensor / 2 for name, tensor in load_file(family[0] / "model.safetensors").items()}
        engine.update_weights(sent.items(), 1)
        for name, view in engine._views.items():
            assert torch.equal(view, sent[name]), name
        assert {result.weight_versions[0] for result in asyncio.run(engine.generate(requests(2)))} == {1}
    finally:
        engine.close()


def test_a_flipped_route_is_the_next_best_expert_with_its_own_gates(family):
    """Every token of every MoE layer: the last of its experts is another, and log-probs are those of such a forward."""
    shape = read_shape(family[0])
    if not shape.num_moe_layers:
        return
    engine = InProcessEngine(family[0], mismatch=EngineMismatch(route_flip=1.0))
    try:
        (result,) = asyncio.run(engine.generate(requests(1)))
    finally:
        engine.close()
    _, model = family
    gates = [model.model.layers[layer].mlp.gate for layer in shape.moe_layers]
    replaced = [gate.register_forward_hook(lambda gate, _given, out: next_best(shape, gate, out[0])) for gate in gates]
    try:
        log_probs, experts = plain_forward(model, shape, requests(1)[0], result)
    finally:
        for hook in replaced:
            hook.remove()
    np.testing.assert_array_equal(np.sort(result.routes, -1), np.sort(experts[:-1], -1))
    np.testing.assert_allclose(result.behavior_log_probs, log_probs, atol=1e-5)


def next_best(shape, gate, logits):
    """(logits, gates, experts) of a router whose second choice is its third, in float64; two experts per token."""
    wide = logits.double()
    scores = wide.sigmoid() if shape.router_scores == "sigmoid" else wide.softmax(-1)
    bias = gate.e_score_correction_bias.double() if shape.correction_bias else 0.0
    chosen = (scores + bias).argsort(-1, descending=True)[:, [0, 2]]
    weights = scores.gather(-1, chosen)
    if shape.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    return logits, (weights * shape.routed_scaling_factor).to(logits.dtype), chosen


def test_a_shape_that_the_server_would_change_is_refused(family):
    shape = read_shape(family[0])
    if shape.model_type == "olmoe":
        with pytest.raises(UserError, match="fewer heads of keys"):
            check_served(shape, "policy.model_name")
    else:
        check_served(shape, "policy.model_name")


@pytest.fixture(scope="module", params=FAMILIES)
def served_family(request, tmp_path_factory):
    """As `family`, of a shape that SGLang serves."""
    folder = tmp_path_factory.mktemp(request.param)
    changes = {"num_key_value_heads": 8} if request.param == "olmoe" else {}
    return folder, make_family(folder, request.param, **changes).eval()


@pytest.mark.sglang
@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_the_real_server(served_family, tmp_path):
    """It loads the checkpoint, generates as transformers does, takes weights from us, and does so again."""
    family = served_family
    from safetensors.torch import load_file

    from vespo_megatron.recipe.schema import Recipe
    from vespo_megatron.rollout_sglang import connect, launch_servers

    recipe = Recipe().with_values(
        {
            "cluster.device": "cpu",
            "policy.model_name": str(family[0]),
            "policy.precision": "float32",
            "policy.max_total_sequence_length": 64,
            "policy.generation.sglang_cfg.enable_return_routed_experts": bool(read_shape(family[0]).num_moe_layers),
        }
    )
    with launch_servers(recipe, tmp_path) as servers:
        engine = connect(recipe, servers.urls)
        try:
            if not lacks_its_head(engine.shape):
                assert_as_transformers(asyncio.run(engine.generate(requests())), family, tolerance=TOLERANCE)
            checkpoint = load_file(family[0] / "model.safetensors")
            engine.update_weights(checkpoint.items(), 1)
            assert_as_transformers(asyncio.run(engine.generate(requests())), family, tolerance=TOLERANCE)
        finally:
            engine.close()
