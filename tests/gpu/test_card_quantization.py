"""Fake quantisation on the device is that on the host, to the last bit, and is what real float8 numbers compute."""

from __future__ import annotations

import pytest
import torch

from vespo_megatron.quantization import FORMATS, fake_quantize, fake_quantize_cache, fake_quantize_tokens

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def numbers(host_generator, dtype, *shape: int) -> torch.Tensor:
    """Of many sizes, with a block of zeros and numbers on the edges of the formats among them."""
    values = torch.randn(shape, generator=host_generator) * 10 ** torch.randn(shape, generator=host_generator)
    values = values.clamp(-6e4, 6e4)
    values[..., :3, :] = 0.0
    values[..., -1, :4] = torch.tensor([448.0, -448.0, 2.0**-9, 2.0**-10])
    return values.to(dtype)


def same(found: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    different = (found.cpu() != wanted) & ~(found.cpu().isnan() & wanted.isnan())
    assert not different.any(), f"{what}: {int(different.sum())} of {wanted.numel()} numbers differ"


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", FORMATS)
def test_weights_are_rounded_as_on_the_host(scheme, dtype, device, host_generator):
    for shape in ((300, 257), (3, 130, 128), (5, 7)):
        weight = numbers(host_generator, dtype, *shape)
        groups = (None, 32, 100) if scheme.startswith("int") else (None,)
        for group in groups:
            same(fake_quantize(weight.to(device), scheme, group), fake_quantize(weight, scheme, group), f"{shape}")


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_and_cache_are_rounded_as_on_the_host(dtype, device, host_generator):
    hidden = numbers(host_generator, dtype, 77, 300)
    for scheme in ("bfloat16", "float16", "fp8_e4m3"):
        same(fake_quantize_tokens(hidden.to(device), scheme), fake_quantize_tokens(hidden, scheme), scheme)
    for scheme in ("bfloat16", "fp8_e4m3"):
        same(fake_quantize_cache(hidden.to(device), scheme), fake_quantize_cache(hidden, scheme), f"cache, {scheme}")


@pytest.mark.cuda
def test_a_block_that_is_not_finite_is_not_hidden(device):
    weight = torch.ones(256, 256, device=device)
    weight[3, 5], weight[200, 200] = float("inf"), float("nan")
    rounded = fake_quantize(weight, "fp8_e4m3")
    assert not rounded[:128, :128].isfinite().any() and not rounded[128:, 128:].isfinite().any()
    assert rounded[:128, 128:].isfinite().all()


@pytest.mark.cuda
def test_numbers_of_one_scale_multiply_as_float8_does(device, host_generator, close):
    """`torch._scaled_mm` of real float8 numbers, a scale per tensor, against the product of fake ones in float64."""
    rows, inner, columns = 256, 128, 128
    x, weight = (
        torch.randn(rows, inner, generator=host_generator),
        torch.randn(columns, inner, generator=host_generator),
    )
    x_scale, weight_scale = x.abs().max() / 448, weight.abs().max() / 448
    x8, weight8 = (x / x_scale).to(torch.float8_e4m3fn), (weight / weight_scale).to(torch.float8_e4m3fn)
    wanted = (x8.double() * x_scale.double()) @ (weight8.double() * weight_scale.double()).t()
    # The same numbers by the recipe's own rounding: one block of 128 × 128 has one scale.
    close("the weight", fake_quantize(weight, "fp8_e4m3"), weight8.double() * weight_scale.double(), 1e-6)
    found = torch._scaled_mm(
        x8.to(device),
        weight8.to(device).t(),
        scale_a=x_scale.to(device),
        scale_b=weight_scale.to(device),
        out_dtype=torch.float32,
        use_fast_accum=False,
    )
    # An H100 adds products of float8 with fewer bits than float32 has.
    close("product", found, wanted, 2e-3)


@pytest.mark.cuda
def test_blocks_multiply_as_block_scaled_float8_does(device, host_generator, close):
    """DeepSeek's scales: 1 × 128 of activations, 128 × 128 of weights; each block by `torch._scaled_mm`, then added."""
    rows, inner, columns = 64, 384, 256
    x, weight = (
        torch.randn(rows, inner, generator=host_generator),
        torch.randn(columns, inner, generator=host_generator),
    )
    emulated = fake_quantize_tokens(x, "fp8_e4m3").double() @ fake_quantize(weight, "fp8_e4m3").double().t()
    total = torch.zeros(rows, columns, device=device)
    one = torch.ones((), device=device)
    for start in range(0, inner, 128):
        part = x[:, start : start + 128]
        x_scale = part.abs().amax(1, keepdim=True) / 448
        x8 = (part / x_scale).to(torch.float8_e4m3fn).to(device)
        for column in range(0, columns, 128):
            block = weight[column : column + 128, start : start + 128]
            scale = block.abs().max() / 448
            weight8 = (block / scale).to(torch.float8_e4m3fn).to(device)
            product = torch._scaled_mm(
                x8, weight8.t(), scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=False
            )
            total[:, column : column + 128] += product * x_scale.to(device) * scale.to(device)
    # Scales of float64 and of float32 round a number in ten thousand to another neighbour.
    close("product", total, emulated, 2e-3)


def test_a_policy_computes_with_the_rounded_weights_and_keeps_its_own(rank_info, tiny_folder, close):
    from gpu_policy import make_batch, make_policy, micro_batches, weights

    from vespo_megatron.megatron.policy import MegatronPolicy

    plain = make_policy(tiny_folder, rank_info)
    config = plain.config.with_values({"quantization.scheme": "fp8_e4m3", "quantization.where": "both"})
    rounded = MegatronPolicy(config, rank_info)
    batches = micro_batches(plain, make_batch())
    before, own = rounded.log_probs(batches), weights(rounded)
    for name, tensor in weights(plain).items():
        assert torch.equal(tensor, own[name]), f"{name} did not come back"
    apart = sum(float((a - b).norm()) for a, b in zip(before, plain.log_probs(batches), strict=True))
    assert apart > 1e-3, "the rounded weights were not used"
