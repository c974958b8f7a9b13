"""The router shift of a training step: one token's γ from transformers' model in float64, and every layout like one."""

from __future__ import annotations

import copy
import math

import layout_work
import numpy as np
import pytest
import router_shift_work
import torch
from test_layout_parity import LAYOUTS

TOLERANCE = 1e-5
"""Of γ between two layouts, in float32; it moves by .3."""


def run(workers, name, folder, **arguments):
    world_size, layout = LAYOUTS.get(name, (1, {}))
    return workers.run(router_shift_work.two_updates, world_size, folder=folder, layout=layout, **arguments)


def by_sample(answers, mini_batch):
    """Sample id → γ [R], from every (data, context) shard."""
    found = {}
    shards = [answer["gamma"][mini_batch] for answer in answers if answer["gamma"] is not None]
    if shards[0][0][0].context_parallel_size == 1:
        shards = [[part for shard in shards for part in shard]]
    for parts in zip(*shards, strict=True):
        parts = sorted(parts, key=lambda part: part[0].context_parallel_rank)
        merged = parts[0][0].merge_response_values([values for _, _, values in parts])
        found |= dict(zip(parts[0][1], merged, strict=True))
    return found


@pytest.fixture(scope="module")
def one_process(workers, checkpoint):
    return run(workers, "one", checkpoint[0])


def router_log_probs(model, token_ids):
    """Layer → float64 [tokens, experts], from the inputs of transformers' routers."""
    seen, handles = {}, []
    for number, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "gate"):

            def look(gate, inputs, number=number):
                logits = inputs[0].double().flatten(0, -2) @ gate.weight.double().T
                seen[number] = logits.log_softmax(-1)

            handles.append(layer.mlp.gate.register_forward_pre_hook(look))
    with torch.no_grad():
        model(torch.from_numpy(token_ids)[None])
    for handle in handles:
        handle.remove()
    return seen


def test_gamma_is_the_formula_on_transformers_model(one_process, checkpoint):
    old, new = checkpoint[1], copy.deepcopy(checkpoint[1])
    with torch.no_grad():
        under = one_process[0]["under"][1]
        for name, parameter in new.named_parameters():
            if name in under:
                parameter.copy_(under[name])
        gates = [layer.mlp.gate for layer in new.model.layers if hasattr(layer.mlp, "gate")]
        before = [layer.mlp.gate for layer in old.model.layers if hasattr(layer.mlp, "gate")]
        assert len(gates) == 3 and all(not torch.equal(a.weight, b.weight) for a, b in zip(gates, before, strict=True))
        for number, layer in enumerate(new.model.layers):  # transformers has a layer's experts in one tensor
            if not hasattr(layer.mlp, "gate"):
                continue
            part = {key: value for key, value in under.items() if key.startswith(f"model.layers.{number}.mlp.experts.")}
            for expert in range(layout_work.NUM_EXPERTS):
                prefix = f"model.layers.{number}.mlp.experts.{expert}"
                gate_up = torch.cat([part[f"{prefix}.gate_proj.weight"], part[f"{prefix}.up_proj.weight"]])
                layer.mlp.experts.gate_up_proj[expert].copy_(gate_up)
                layer.mlp.experts.down_proj[expert].copy_(part[f"{prefix}.down_proj.weight"])
    samples = {sample.sample_id: sample for sample in layout_work.ragged_batch().samples}
    found = by_sample(one_process, 1)
    assert len(found) == 8
    worst, smallest = 0.0, 1.0
    for sample_id, gamma in found.items():
        sample = samples[sample_id]
        then, now = router_log_probs(old, sample.token_ids), router_log_probs(new, sample.token_ids)
        for index, value in enumerate(gamma):
            row = len(sample.prompt_ids) - 1 + index  # where the token is predicted
            distances = []
            for layer, scores in then.items():
                chosen = sorted(range(layout_work.NUM_EXPERTS), key=lambda e, s=scores, r=row: -float(s[r, e]))[:2]
                distances.append(np.mean([abs(float(now[layer][row, e] - scores[row, e])) for e in chosen]))
            worst = max(worst, abs(value - math.exp(-np.mean(distances))))
            smallest = min(smallest, value)
    print(f"γ within {worst:.1e} of the formula, down to {smallest:.2f}")
    assert worst < TOLERANCE and smallest < 0.9


@pytest.mark.parametrize("name", ["one", "tp2_ep2", "pp2"])
def test_before_the_weights_have_moved_it_is_one_to_the_last_bit(name, workers, checkpoint, one_process):
    answers = one_process if name == "one" else run(workers, name, checkpoint[0])
    assert all((gamma == 1).all() for gamma in by_sample(answers, 0).values())


@pytest.mark.parametrize(
    "name",
    [
        "dp2",
        "tp2_ep2",
        "cp2",
        "pp2",
        "vpp",
        "recompute",
        *(pytest.param(name, marks=pytest.mark.nightly) for name in ("tp2_cp2_recompute", "tp2_pp2_cp2_ep2")),
    ],
)
def test_every_layout_measures_what_one_process_measures(name, workers, checkpoint, one_process):
    answers = run(workers, name, checkpoint[0])
    expected, found = by_sample(one_process, 1), by_sample(answers, 1)
    assert found.keys() == expected.keys()
    worst = max(np.abs(found[key] - expected[key]).max() for key in expected)
    spread = max(np.abs(1 - values).max() for values in expected.values())
    print(f"{name}: γ within {worst:.1e}; it moves by {spread:.2f}")
    assert worst < TOLERANCE and spread > 0.1
    ours, theirs = answers[0]["metrics"], one_process[0]["metrics"]
    for key in ("router_shift/mean", "router_shift/floored", "loss/grad_norm"):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-3), key
    assert 0.8 < theirs["router_shift/mean"] < 1


@pytest.mark.parametrize("replay", ["R2", "R3"])
def test_the_experts_compared_are_those_that_were_active(replay, workers, checkpoint):
    for answer in run(workers, "tp2_ep2", checkpoint[0], replay=replay):
        assert answer["experts_are_those_replayed"]
        if answer["gamma"] is not None:
            assert all((gamma == 1).all() for _, _, gamma in answer["gamma"][0])


@pytest.mark.parametrize(
    "more",
    [
        {"objective": "m2po", "hyperparameters": {"m2_threshold": 0.001}},
        {"objective": "gspo", "apply": "after_clip", "correction": {"weight": "tis", "normalize": True}},
    ],
    ids=["searched for", "corrected"],
)
@pytest.mark.parametrize("name", ["one", "pp2"])
def test_with_what_looks_at_a_whole_mini_batch(name, more, workers, checkpoint):
    metrics = run(workers, name, checkpoint[0], **more)[0]["metrics"]
    assert 0.8 < metrics["router_shift/mean"] < 1 and math.isfinite(metrics["loss/grad_norm"])
