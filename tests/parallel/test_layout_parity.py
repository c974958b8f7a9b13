"""One checkpoint, one ragged batch: every parallel layout computes what one process computes."""

from __future__ import annotations

import layout_work
import numpy as np
import pytest
import torch

TP, PP, CP, EP = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
)
SP, VPP, ETP = "sequence_parallel", "virtual_pipeline_model_parallel_size", "expert_tensor_parallel_size"

LAYOUTS = {
    "dp2": (2, {}),
    "tp2": (2, {TP: 2}),
    "tp2_sp": (2, {TP: 2, SP: True}),
    "tp2_sp_etp2": (2, {TP: 2, SP: True, ETP: 2}),
    "pp2": (2, {PP: 2}),
    "vpp": (2, {PP: 2, VPP: 2}),
    "cp2": (2, {CP: 2}),
    "cp4": (4, {CP: 4}),
    "ep2": (2, {EP: 2}),
    "ep4": (4, {EP: 4}),
    "tp2_ep2": (2, {TP: 2, EP: 2, SP: True}),
    "tp2_cp2": (4, {TP: 2, CP: 2, SP: True}),
    "pp2_cp2_ep2": (4, {PP: 2, CP: 2, EP: 2}),
    "tp2_pp2_cp2_ep2": (8, {TP: 2, PP: 2, CP: 2, EP: 2, SP: True}),
    "recompute": (1, {"recompute_granularity": "full"}),
    "tp2_cp2_recompute": (4, {TP: 2, CP: 2, SP: True, "recompute_granularity": "full"}),
    "selective_recompute": (2, {CP: 2, "recompute_granularity": "selective"}),
}
TOLERANCE = 1e-4


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖"""
    return float((actual - expected).norm() / expected.norm())


def worst(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest relative error of any tensor; where 0 is expected (an expert no route names), 0 must be."""
    assert actual.keys() == expected.keys()
    assert all(actual[name].norm() == 0 for name, tensor in expected.items() if tensor.norm() == 0)
    return max(relative_error(actual[name], tensor) for name, tensor in expected.items() if tensor.norm() > 0)


@pytest.fixture(scope="module")
def one_process(workers, checkpoint):
    return workers.run(layout_work.everything, 1, folder=checkpoint[0], layout={})[0]


@pytest.fixture(scope="module", params=LAYOUTS)
def layout_answers(request, workers, checkpoint):
    """(name, every rank's answers) of one layout, set up once for all tests of it."""
    world_size, layout = LAYOUTS[request.param]
    return request.param, workers.run(layout_work.everything, world_size, folder=checkpoint[0], layout=layout)


def test_hf_to_megatron_to_hf_is_bit_equal(layout_answers, checkpoint):
    _, answers = layout_answers
    from safetensors.torch import load_file

    original = load_file(f"{checkpoint[0]}/model.safetensors")
    assert answers[0]["loaded"].keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(answers[0]["loaded"][name], tensor), name


@pytest.mark.parametrize("routes", ["live", "R2", "R3"])
def test_loss_and_gradients_are_those_of_one_process(routes, layout_answers, one_process):
    name, answers = layout_answers
    errors = {
        "loss": abs(sum(answer[routes]["loss"] for answer in answers) / one_process[routes]["loss"] - 1),
        "gradients": worst(answers[0][routes]["gradients"], one_process[routes]["gradients"]),
    }
    print(f"{name}, {routes}: " + ", ".join(f"{kind} {error:.1e}" for kind, error in errors.items()))
    assert max(errors.values()) <= TOLERANCE, errors


def test_the_update_is_that_of_one_process(layout_answers, one_process):
    name, answers = layout_answers
    errors = {
        "update": worst(answers[0]["update"], one_process["update"]),
        "grad_norm": abs(answers[0]["grad_norm"] / one_process["grad_norm"] - 1),
    }
    print(f"{name}: " + ", ".join(f"{kind} {error:.1e}" for kind, error in errors.items()))
    assert max(errors.values()) <= TOLERANCE, errors


def test_random_routes_change_the_gradient(one_process):
    """Or equality under R3 would prove nothing about routes."""
    name = "model.layers.3.mlp.gate.weight"
    assert relative_error(one_process["R3"]["gradients"][name], one_process["live"]["gradients"][name]) > 0.1


def test_one_process_sends_itself_nothing(workers, checkpoint):
    """gloo's threads would bring OpenMP workers of their own, and all of them would sleep between operations."""
    assert workers.run(layout_work.messages, 1, folder=checkpoint[0], layout={})[0] == set()
    assert len(workers.run(layout_work.messages, 2, folder=checkpoint[0], layout={})[0]) >= 3


OBJECTIVES = ("vespo", "grpo", "gspo", *layout_work.WHOLE_MINI_BATCH)


@pytest.fixture(scope="module")
def near_policy(workers, checkpoint):
    """μ near the policy (5% off per token), so that W is neither 0 nor infinite; and one process's answer."""
    generator = np.random.default_rng(1)
    behavior = {}
    for layout, sample_ids, output in workers.run(layout_work.log_probs, 1, folder=checkpoint[0], layout={})[0]:
        for sample_id, values in zip(sample_ids, layout.merge_response_values([output[0]]), strict=True):
            behavior[sample_id] = (values + generator.normal(0, 0.05, len(values))).astype(np.float32)
    run = {"folder": checkpoint[0], "names": OBJECTIVES, "behavior": behavior}
    return run, workers.run(layout_work.objectives, 1, layout={}, **run)[0]


@pytest.mark.parametrize("name", ["dp2", "cp4", "tp2_cp2", "pp2_cp2_ep2"])
def test_every_objective_has_one_process_gradient(name, workers, near_policy):
    run, expected = near_policy
    world_size, layout = LAYOUTS[name]
    answers = workers.run(layout_work.objectives, world_size, layout=layout, **run)
    for objective in OBJECTIVES:
        error = worst(answers[0][objective]["gradients"], expected[objective]["gradients"])
        loss = sum(answer[objective]["loss"] for answer in answers) / expected[objective]["loss"] - 1
        print(f"{objective}, {name}: loss {abs(loss):.1e}, gradients {error:.1e}")
        assert max(error, abs(loss)) <= TOLERANCE, objective


@pytest.mark.parametrize("name", ["one", "tp2_sp", "cp2", "cp4", "tp2_pp2_cp2_ep2"])
def test_log_probs_equal_transformers(name, workers, checkpoint):
    world_size, layout = LAYOUTS.get(name, (1, {}))
    shards = [s for s in workers.run(layout_work.log_probs, world_size, folder=checkpoint[0], layout=layout) if s]
    samples = {sample.sample_id: sample for sample in layout_work.ragged_batch().samples}
    worst = 0.0
    data_size = len(shards) // layout.get(CP, 1)
    assert data_size == 1
    for per_rank in zip(*shards, strict=False):
        layout_of_batch = per_rank[0][0]
        ranked = sorted(per_rank, key=lambda shard: shard[0].context_parallel_rank)
        log_probs = layout_of_batch.merge_response_values([out[0] for _, _, out in ranked])
        entropies = layout_of_batch.merge_response_values([out[1] for _, _, out in ranked])
        for sample_id, log_prob, entropy in zip(per_rank[0][1], log_probs, entropies, strict=False):
            sample = samples.pop(sample_id)
            with torch.no_grad():
                logits = checkpoint[1](torch.from_numpy(sample.token_ids)[None]).logits[0] / 0.9
            expected = logits.log_softmax(-1)[len(sample.prompt_ids) - 1 : -1]
            picked = expected.gather(-1, torch.from_numpy(sample.response_ids)[:, None])[:, 0]
            worst = max(worst, np.abs(picked.numpy() - log_prob).max())
            np.testing.assert_allclose(-(expected.exp() * expected).sum(-1).numpy(), entropy, atol=1e-4)
    assert not samples, "every sample was scored"
    print(f"{name}: log-probs within {worst:.1e} of transformers")
    assert worst <= 1e-4
