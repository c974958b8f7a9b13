"""The routers' own losses: transformers' router logits in a formula of their own, on every layout."""

from __future__ import annotations

import layout_work
import pytest
import torch
from test_layout_parity import LAYOUTS, relative_error

from vespo_megatron.trainer.router_loss_metrics import router_loss_metrics

SOME_LAYOUTS = ("one", "dp2", "tp2", "tp2_sp", "cp2", "vpp", "tp2_pp2_cp2_ep2", "tp2_cp2_recompute")
BALANCE, Z = 0.3, 0.02
KEYS = {
    "whole update": {
        "moe_router_load_balancing_type": "global_aux_loss",
        "moe_aux_loss_coeff": BALANCE,
        "moe_z_loss_coeff": Z,
    },
    "micro-batch": {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": BALANCE},
}
EIGHT = [list(range(len(layout_work.LENGTHS)))[index::8] for index in range(8)]
"""The samples of each of eight micro-batches."""


@pytest.fixture(scope="module", params=KEYS)
def by_formula(request, checkpoint):
    """(kind, losses, gradients of them by transformers' names), each summed in float64 over single sequences."""
    model = checkpoint[1]
    logits: dict[int, list[torch.Tensor]] = {}
    layers = [index for index, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "gate")]
    handles = [
        model.model.layers[layer].mlp.gate.register_forward_hook(
            lambda _, __, output, layer=layer: logits.setdefault(layer, []).append(output[0].double())
        )
        for layer in layers
    ]
    for sample in layout_work.ragged_batch().samples:
        model(torch.from_numpy(sample.token_ids)[None])
    for handle in handles:
        handle.remove()
    tokens = sum(len(each) for each in logits[layers[0]])
    balance, z = {}, {}
    for layer, by_sample in logits.items():
        balance[layer + 1] = z[layer + 1] = torch.zeros((), dtype=torch.float64)
        for group in EIGHT if request.param == "micro-batch" else [range(len(by_sample))]:
            together = torch.cat([by_sample[index] for index in group])
            chosen = together.topk(layout_work.TOPK).indices
            shares = chosen.flatten().bincount(minlength=layout_work.NUM_EXPERTS) / chosen.numel()
            chances = together.softmax(-1).mean(0)
            weight = len(together) / tokens
            balance[layer + 1] = balance[layer + 1] + weight * layout_work.NUM_EXPERTS * (shares * chances).sum()
            z[layer + 1] = z[layer + 1] + weight * together.exp().sum(-1).log().square().mean()
    total = BALANCE * sum(balance.values()) + (Z if request.param == "whole update" else 0.0) * sum(z.values())
    names = [name for name, _ in model.named_parameters() if "experts" not in name and "lm_head" not in name]
    gradients = torch.autograd.grad(total, [model.get_parameter(name) for name in names], allow_unused=True)
    losses = {layer: (float(balance[layer].detach()), float(z[layer].detach())) for layer in balance}
    return request.param, losses, dict(zip(names, gradients, strict=True))


@pytest.mark.parametrize("name", SOME_LAYOUTS)
def test_gradients_and_values_are_those_of_the_formula(name, workers, checkpoint, by_formula):
    kind, losses, expected = by_formula
    world_size, layout = LAYOUTS.get(name, (1, {}))
    count = 4 if name == "dp2" else 8
    answers = workers.run(
        layout_work.router_losses, world_size, folder=checkpoint[0], layout=layout | KEYS[kind], count=count
    )
    metrics = router_loss_metrics([answer["stage"] for answer in answers], per_layer=True)
    mean = sum(balance for balance, _ in losses.values()) / len(losses)
    assert metrics["routes/load_balancing_loss"] == pytest.approx(mean, rel=1e-5)
    for layer, (balance, z) in losses.items():
        assert metrics[f"routes/load_balancing_loss_layer_{layer}"] == pytest.approx(balance, rel=1e-5)
        if kind == "whole update":
            assert metrics[f"routes/z_loss_layer_{layer}"] == pytest.approx(z, rel=1e-5)
    assert ("routes/z_loss" in metrics) == (kind == "whole update")
    gradients = answers[0]["gradients"]
    errors = {}
    for parameter, gradient in expected.items():
        ours = gradients[parameter]
        if gradient is None or gradient.norm() == 0:
            assert ours.norm() == 0, parameter
        else:
            errors[parameter] = relative_error(ours, gradient)
    worst = max(errors, key=errors.get)
    print(f"{kind}, {name}: {worst} {errors[worst]:.1e}")
    assert len(errors) > 10 and errors[worst] <= 1e-4
