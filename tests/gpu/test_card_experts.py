"""The experts' grouped products in bfloat16, forward and backward, against a loop in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vespo_megatron.megatron.native.experts import _GroupedSwiGLU

ROUNDING = 2e-2
"""Of bfloat16, after three products: 5e-3 is usual."""
CASES = {
    "ragged": (64, 32, [3, 0, 5, 1, 0, 7, 16, 2]),
    "one token": (64, 32, [0, 0, 1, 0, 0, 0, 0, 0]),
    "no token": (64, 32, [0] * 8),
    "all to one": (64, 32, [0, 0, 100, 0, 0, 0, 0, 0]),
    "widths that grouped products refuse": (60, 20, [3, 0, 5, 1, 0, 7, 16, 2]),
    "rows that end in the midst of a tile": (128, 96, [129, 1, 127, 128]),
}


def looped(x, probs, fc1, fc2, counts):
    """The definition, one expert after the other."""
    parts = []
    by_expert = zip(x.split(counts), probs.split(counts), fc1.unbind(), fc2.unbind(), strict=True)
    for rows, scale, first, second in by_expert:
        gate, up = (rows @ first.t()).chunk(2, dim=1)
        parts.append((F.silu(gate) * up * scale[:, None]) @ second.t())
    return torch.cat(parts)


def leaves(hidden, inner, counts, device, generator):
    def normal(*shape, scale=1.0):
        made = torch.randn(*shape, device=device, generator=generator) * scale
        return made.to(torch.bfloat16).requires_grad_()

    probs = torch.rand(sum(counts), device=device, generator=generator).requires_grad_()
    first = normal(len(counts), 2 * inner, hidden, scale=hidden**-0.5)
    return normal(sum(counts), hidden), probs, first, normal(len(counts), hidden, inner, scale=inner**-0.5)


def errors(found, wanted):
    """‖found − wanted‖ / ‖wanted‖ of each, in float64; where zeros are wanted, zeros must be found."""
    pairs = [(ours.double(), theirs.double()) for ours, theirs in zip(found, wanted, strict=True)]
    return [float((ours - theirs).norm() / (theirs.norm() if theirs.norm() > 0 else 1)) for ours, theirs in pairs]


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("case", CASES)
def test_grouped_products_are_the_loop_s(case, where, device, generator, note):
    hidden, inner, counts = CASES[case]
    given = leaves(hidden, inner, counts, device, generator)
    exact = [leaf.detach().double().requires_grad_() for leaf in given]
    weight = torch.randn(sum(counts), hidden, device=device, generator=generator)
    output = looped(*exact, counts)
    wanted = [output, *torch.autograd.grad((output * weight.double()).sum(), exact)]
    numbers = torch.tensor(counts, device=device if where == "device" else "cpu")
    output = _GroupedSwiGLU.apply(*given, numbers)
    found = [output, *torch.autograd.grad((output * weight.to(output.dtype)).sum(), given)]
    note(worst=max(errors(found, wanted)))
    bound = 10 * ROUNDING if case == "one token" else ROUNDING  # a single sum, which may all but cancel
    assert all(error < bound for error in errors(found, wanted)), errors(found, wanted)


def test_gradients_are_added_into_main_grad(device, generator):
    counts = [3, 0, 5, 1]
    x, probs, first, second = leaves(64, 32, counts, device, generator)
    exact = [leaf.detach().double().requires_grad_() for leaf in (x, probs, first, second)]
    weight = torch.randn(sum(counts), 64, device=device, generator=generator)
    wanted = torch.autograd.grad((looped(*exact, counts) * weight.double()).sum(), exact[2:])
    for leaf in (first, second):
        leaf.main_grad = torch.zeros(leaf.shape, device=device)
    for _ in range(2):
        output = _GroupedSwiGLU.apply(x, probs, first, second, torch.tensor(counts, device=device))
        output.backward(weight.to(output.dtype))
    found = [leaf.main_grad / 2 for leaf in (first, second)]
    assert all(error < ROUNDING for error in errors(found, wanted)), errors(found, wanted)


@pytest.mark.cuda
def test_the_30b_layer_s_own_size(device, generator, note):
    """128 experts of 2048 × 768, a few thousand rows between them, some without any."""
    counts = torch.randint(-10, 60, (128,), generator=torch.Generator().manual_seed(1)).clamp(min=0).tolist()
    given = leaves(2048, 768, counts, device, generator)
    weight = torch.randn(sum(counts), 2048, device=device, generator=generator)
    output = _GroupedSwiGLU.apply(*given, torch.tensor(counts, device=device))
    found = torch.autograd.grad((output * weight.to(output.dtype)).sum(), given)
    starts = [0, *torch.tensor(counts).cumsum(0).tolist()]
    worst = 0.0
    for expert in [each for each, count in enumerate(counts) if count][:24]:
        rows = slice(starts[expert], starts[expert + 1])
        own = [given[0][rows], given[1][rows], given[2][expert : expert + 1], given[3][expert : expert + 1]]
        exact = [leaf.detach().double().requires_grad_() for leaf in own]
        wanted = looped(*exact, [counts[expert]])
        slopes = torch.autograd.grad((wanted * weight[rows].double()).sum(), exact)
        ours = [
            output[rows],
            found[0][rows],
            found[1][rows],
            found[2][expert : expert + 1],
            found[3][expert : expert + 1],
        ]
        worst = max(worst, *errors(ours, [wanted, *slopes]))
    note(worst=worst)
    assert worst < ROUNDING
    assert all(float(found[2][expert].abs().max()) == 0 for expert, count in enumerate(counts) if not count)
