"""One checkpoint, one ragged batch: every parallel layout computes what one process computes."""

from __future__ import annotations

import layout_work
import numpy as np
import pytest
import torch

from vespo_megatron.recipe.schema import LossConfig

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


@pytest.fixture(scope="module")
def one_process(workers, checkpoint):
    return workers.run(layout_work.gradients_and_update, 1, folder=checkpoint[0], layout={})[0]


def compare(answers, expected) -> dict[str, float]:
    """Relative errors of a layout's answers against one process's."""
    errors = {"loss": abs(sum(answer["loss"] for answer in answers) / expected["loss"] - 1)}
    for kind in ("gradients", "update"):
        assert answers[0][kind].keys() == expected[kind].keys()
        errors[kind] = max(relative_error(answers[0][kind][name], tensor) for name, tensor in expected[kind].items())
    errors["grad_norm"] = abs(answers[0]["grad_norm"] / expected["grad_norm"] - 1)
    return errors


@pytest.mark.parametrize("name", LAYOUTS)
def test_loss_gradients_and_update_are_those_of_one_process(name, workers, checkpoint, one_process):
    world_size, layout = LAYOUTS[name]
    answers = workers.run(layout_work.gradients_and_update, world_size, folder=checkpoint[0], layout=layout)
    errors = compare(answers, one_process)
    print(f"{name}: " + ", ".join(f"{kind} {error:.1e}" for kind, error in errors.items()))
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.fixture(scope="module")
def behavior(workers, checkpoint):
    """μ near the policy (a few per cent off per token), so that W is neither 0 nor infinite."""
    generator = np.random.default_rng(1)
    near = {}
    for layout, sample_ids, output in workers.run(layout_work.log_probs, 1, folder=checkpoint[0], layout={})[0]:
        for sample_id, values in zip(sample_ids, layout.merge_response_values([output[0]]), strict=True):
            near[sample_id] = (values + generator.normal(0, 0.05, len(values))).astype(np.float32)
    return near


@pytest.mark.parametrize("objective", ["vespo", "grpo", "gspo"])
def test_an_objective_has_the_same_gradient_on_every_layout(objective, workers, checkpoint, behavior):
    loss_fn = LossConfig(name=objective)
    run = {"folder": checkpoint[0], "loss_fn": loss_fn, "behavior": behavior}
    expected = workers.run(layout_work.gradients_and_update, 1, layout={}, **run)[0]
    for name in ("dp2", "cp4", "tp2_cp2", "pp2_cp2_ep2"):
        world_size, layout = LAYOUTS[name]
        errors = compare(workers.run(layout_work.gradients_and_update, world_size, layout=layout, **run), expected)
        print(f"{objective}, {name}: " + ", ".join(f"{kind} {error:.1e}" for kind, error in errors.items()))
        assert max(errors.values()) <= TOLERANCE, (name, errors)


@pytest.mark.parametrize("name", LAYOUTS)
def test_hf_to_megatron_to_hf_is_bit_equal(name, workers, checkpoint):
    world_size, layout = LAYOUTS[name]
    back = workers.run(layout_work.round_trip, world_size, folder=checkpoint[0], layout=layout)[0]
    from safetensors.torch import load_file

    original = load_file(f"{checkpoint[0]}/model.safetensors")
    assert back.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(back[name], tensor), name


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
