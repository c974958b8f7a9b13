"""The grouped experts in bfloat16 (on a GPU `torch._grouped_mm`) against one expert after the other in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vespo_megatron.megatron.native import experts as grouped

# A product of bfloat16 numbers is rounded to 2⁻⁹ of itself; three roundings one after another, on average less.
BOUND = 8e-3


def reference(x, probs, fc1, fc2, counts, upstream):
    """Value and gradients in float64, on the device of `x`."""
    leaves = [each.detach().double().requires_grad_() for each in (x, probs, fc1, fc2)]
    x, probs, fc1, fc2 = leaves
    parts, start = [], 0
    for expert, count in enumerate(counts):
        rows = slice(start, start := start + count)
        gate, up = (x[rows] @ fc1[expert].t()).chunk(2, dim=1)
        parts.append((F.silu(gate) * up * probs[rows, None]) @ fc2[expert].t())
    value = torch.cat(parts)
    return value, torch.autograd.grad(value, leaves, upstream.double())


def tensors(counts, hidden, width, host_generator, device, dtype):
    rows, count = sum(counts), len(counts)

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=host_generator, device=host_generator.device)).to(device, dtype)

    x, upstream = normal(rows, hidden), normal(rows, hidden)
    fc1, fc2 = normal(count, 2 * width, hidden, scale=hidden**-0.5), normal(count, hidden, width, scale=width**-0.5)
    probs = torch.rand(rows, generator=host_generator, device=host_generator.device)
    probs = probs.to(device, torch.promote_types(dtype, torch.float32))
    return [each.requires_grad_() for each in (x, probs, fc1, fc2)], upstream


COUNTS = {
    "uneven": [5, 0, 17, 1, 0, 64, 3, 30],
    "one token": [0, 0, 0, 1, 0, 0, 0, 0],
    "all to one": [0, 0, 96, 0, 0, 0, 0, 0],
    "last ones empty": [40, 33, 0, 0, 0, 0, 0, 0],
    "even": [16] * 8,
}


@pytest.mark.parametrize("where", ["counts on the device", "counts on the host"])
@pytest.mark.parametrize("case", COUNTS)
def test_value_and_gradients_are_those_of_each_expert_alone(case, where, device, host_generator, close):
    counts = COUNTS[case]
    leaves, upstream = tensors(counts, 64, 32, host_generator, device, torch.bfloat16)
    tokens = torch.tensor(counts, device="cpu" if where == "counts on the host" else device)
    value = grouped._GroupedSwiGLU.apply(*leaves, tokens)
    found = torch.autograd.grad(value, leaves, upstream)
    wanted_value, wanted = reference(*leaves, counts, upstream)
    close("value", value, wanted_value, BOUND)
    for name, ours, theirs in zip(("x", "probs", "fc1", "fc2"), found, wanted, strict=True):
        close(f"gradient of {name}", ours, theirs, 2 * BOUND)
    for expert, count in enumerate(counts):
        if not count:
            assert not found[2][expert].any() and not found[3][expert].any(), f"expert {expert} saw no token"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_main_grad_in_float32_takes_both_of_two_backwards(dtype, device, host_generator, close):
    counts = COUNTS["uneven"]
    leaves, upstream = tensors(counts, 64, 32, host_generator, device, dtype)
    for weight in leaves[2:]:
        weight.main_grad = torch.ones(weight.shape, device=device)
    for _ in range(2):
        grouped._GroupedSwiGLU.apply(*leaves, torch.tensor(counts, device=device)).backward(upstream)
    _, wanted = reference(*leaves, counts, upstream)
    for name, weight, gradient in zip(("fc1", "fc2"), leaves[2:], wanted[2:], strict=True):
        assert weight.grad_added_to_main_grad
        close(
            name,
            weight.main_grad - 1,
            2 * gradient,
            {torch.bfloat16: 2 * BOUND, torch.float16: BOUND / 4, torch.float32: 1e-5}[dtype],
        )


def test_other_dtypes_are_computed_too(device, host_generator, close):
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-12), (torch.float16, 4e-3)):
        leaves, upstream = tensors(COUNTS["uneven"], 24, 12, host_generator, device, dtype)
        value = grouped._GroupedSwiGLU.apply(*leaves, torch.tensor(COUNTS["uneven"], device=device))
        wanted_value, wanted = reference(*leaves, COUNTS["uneven"], upstream)
        close(f"value {dtype}", value, wanted_value, bound)
        found = torch.autograd.grad(value, leaves, upstream)
        for name, ours, theirs in zip(("x", "probs", "fc1", "fc2"), found, wanted, strict=True):
            close(f"gradient of {name} {dtype}", ours, theirs, 2 * bound)


@pytest.mark.parametrize(("hidden", "width"), [(20, 12), (64, 12), (20, 32)])
def test_widths_off_sixteen_bytes_are_computed_too(hidden, width, device, host_generator, close):
    """`torch._grouped_mm` refuses rows that do not begin on 16 bytes."""
    counts = COUNTS["uneven"]
    leaves, upstream = tensors(counts, hidden, width, host_generator, device, torch.bfloat16)
    value = grouped._GroupedSwiGLU.apply(*leaves, torch.tensor(counts, device=device))
    found = torch.autograd.grad(value, leaves, upstream)
    wanted_value, wanted = reference(*leaves, counts, upstream)
    close("value", value, wanted_value, BOUND)
    for name, ours, theirs in zip(("x", "probs", "fc1", "fc2"), found, wanted, strict=True):
        close(f"gradient of {name}", ours, theirs, 2 * BOUND)


def test_no_tokens_at_all(device, host_generator):
    leaves, upstream = tensors([0, 0, 0], 64, 32, host_generator, device, torch.bfloat16)
    value = grouped._GroupedSwiGLU.apply(*leaves, torch.zeros(3, dtype=torch.int64, device=device))
    assert value.shape == (0, 64)
    for leaf, gradient in zip(leaves, torch.autograd.grad(value, leaves, upstream), strict=True):
        assert gradient.shape == leaf.shape and not gradient.any()


@pytest.mark.cuda
@pytest.mark.parametrize("spread", ["half of the experts empty", "all to one"])
def test_a_layer_of_the_30b_model(spread, device, host_generator, close):
    """Hidden 2,048, width 768, 128 experts, 8 of them per token: 16,384 rows."""
    rows, experts = 16384, 128
    weights = torch.rand(experts, generator=host_generator)
    if spread == "half of the experts empty":
        weights[::2] = 0
    elif spread == "all to one":
        weights = (torch.arange(experts) == 77).float()
    chosen = torch.multinomial(weights, rows, replacement=True, generator=host_generator)
    counts = torch.bincount(chosen, minlength=experts)
    there = torch.Generator(device).manual_seed(0)
    leaves, upstream = tensors(counts.tolist(), 2048, 768, there, device, torch.bfloat16)
    for weight in leaves[2:]:
        weight.main_grad = torch.zeros(weight.shape, device=device)
    value = grouped._GroupedSwiGLU.apply(*leaves, counts.to(device))
    value.backward(upstream)
    # The reference in float32: float64 would take seconds and tells no more at this bound.
    reference_leaves = [leaf.detach().float().requires_grad_() for leaf in leaves]
    expected = torch.cat(
        [
            ((F.silu(gate) * up) * probs[:, None]) @ fc2.t()
            for rows_of, probs, fc1, fc2 in zip(
                reference_leaves[0].split(counts.tolist()),
                reference_leaves[1].split(counts.tolist()),
                reference_leaves[2],
                reference_leaves[3],
                strict=True,
            )
            for gate, up in [(rows_of @ fc1.t()).chunk(2, dim=1)]
        ]
    )
    close("value", value, expected, BOUND)
    wanted = torch.autograd.grad(expected, reference_leaves, upstream.float())
    close("gradient of x", leaves[0].grad, wanted[0], 2 * BOUND)
    close("gradient of probs", leaves[1].grad, wanted[1], 2 * BOUND)
    close("gradient of fc1", leaves[2].main_grad, wanted[2], 2 * BOUND)
    close("gradient of fc2", leaves[3].main_grad, wanted[3], 2 * BOUND)
