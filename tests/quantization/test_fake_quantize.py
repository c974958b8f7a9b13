"""Every format against a loop over single numbers in float64 that shares nothing with it, and what holds of all."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from vespo_megatron.errors import UserError
from vespo_megatron.quantization import (
    FORMATS,
    WeightQuantizer,
    fake_quantize,
    fake_quantize_cache,
    fake_quantize_tokens,
)
from vespo_megatron.recipe.schema import MismatchConfig, PolicyConfig

# Ragged in rows and columns, single elements, one row, a stack of experts, more than one block each way.
SHAPES = ((1, 1), (1, 7), (5, 33), (128, 128), (131, 259), (3, 17, 40), (2, 130, 5))
INTEGERS = {"int8": 127, "int6": 31, "int4": 7, "int3": 3, "int2": 1}


def e4m3(value: float) -> float:
    """The nearest of ±m · 2^e with three fraction bits, subnormals from 2^−9, at most 448; ties to even."""
    size = abs(value)
    exponent = max(math.frexp(size)[1] - 1, -6) if size else -6
    step = 2.0 ** (exponent - 3)
    return math.copysign(min(round(size / step) * step, 448.0), value)


def bfloat16(value: float) -> float:
    step = 2.0 ** (math.frexp(value)[1] - 8)
    return round(value / step) * step if value else 0.0


def blocks(height: int, width: int, rows: int, columns: int):
    for top in range(0, height, rows):
        for left in range(0, width, columns):
            yield slice(top, top + rows), slice(left, left + columns)


def by_hand(matrix: np.ndarray, scheme: str, rows: int, columns: int) -> np.ndarray:
    result = np.zeros_like(matrix, dtype=np.float64)
    for where in blocks(*matrix.shape, rows, columns):
        block = matrix[where].astype(np.float64)
        amax = np.abs(block).max()
        if amax == 0:
            continue
        for index, value in np.ndenumerate(block):
            if scheme == "fp8_e4m3":
                scale = amax / 448
                rounded = e4m3(float(np.float32(value / scale)))
            else:
                scale = amax / INTEGERS[scheme]
                rounded = float(round(value / scale))  # Python's round is half to even
            result[where][index] = rounded * scale
    return result


def numbers(shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator).exp()).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("scheme", "group_size"), [(name, size) for name in INTEGERS for size in (None, 1, 8, 32)])
def test_integers_are_those_of_the_loop(scheme, group_size, shape, dtype):
    tensor = numbers(shape, seed=len(shape) + shape[-1], dtype=dtype)
    matrices = tensor.float().numpy().reshape(-1, *shape[-2:])
    expected = np.stack([by_hand(each, scheme, 1, group_size or shape[-1]) for each in matrices]).reshape(shape)
    actual = fake_quantize(tensor, scheme, group_size)
    assert actual.dtype is dtype and actual.shape == tensor.shape
    assert torch.equal(actual, torch.from_numpy(expected).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_fp8_is_that_of_the_loop_in_blocks_and_in_groups_of_a_token(shape, dtype):
    tensor = numbers(shape, seed=3, dtype=dtype)
    matrices = tensor.float().numpy().reshape(-1, *shape[-2:])
    for quantize, rows in ((lambda each: fake_quantize(each, "fp8_e4m3"), 128), (by_token, 1)):
        expected = np.stack([by_hand(each, "fp8_e4m3", rows, 128) for each in matrices]).reshape(shape)
        assert torch.equal(quantize(tensor), torch.from_numpy(expected).to(dtype))


def by_token(hidden):
    return fake_quantize_tokens(hidden, "fp8_e4m3")


def test_a_cache_of_fp8_has_no_scale_and_stops_at_its_largest_number():
    states = torch.cat([numbers((500,)) * 100, torch.tensor([0.0, 449.0, -1e9, 2.0**-10, 2.0**-9])])
    expected = [e4m3(float(value)) for value in states]
    assert fake_quantize_cache(states, "fp8_e4m3").tolist() == expected
    assert torch.equal(fake_quantize_cache(states, "bfloat16"), states.bfloat16().float())


def test_bfloat16_and_float16_round_each_number():
    tensor = numbers((40, 7))
    expected = [[bfloat16(value) for value in row] for row in tensor.tolist()]
    assert fake_quantize(tensor, "bfloat16").tolist() == expected
    assert fake_quantize_tokens(tensor, "bfloat16").tolist() == expected
    assert np.array_equal(fake_quantize(tensor, "float16").numpy(), tensor.numpy().astype(np.float16))
    assert fake_quantize(torch.tensor([[1e6]]), "float16").item() == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", FORMATS)
def test_twice_is_once_to_the_last_bit_and_what_came_in_stays(scheme, dtype):
    for seed in range(20):
        tensor = numbers((37, 301), seed, dtype) * 10.0 ** (seed % 5 - 3)
        before = tensor.clone()
        for group_size in (None, 32) if scheme in INTEGERS else (None,):
            once = fake_quantize(tensor, scheme, group_size)
            assert torch.equal(fake_quantize(once, scheme, group_size), once)
        assert torch.equal(tensor, before)
    assert torch.equal(by_token(by_token(tensor)), by_token(tensor))


@pytest.mark.parametrize(("scheme", "levels"), INTEGERS.items())
def test_no_number_moves_by_more_than_half_a_level_and_the_largest_of_a_group_by_nothing(scheme, levels):
    """int8: amax / 254."""
    tensor = numbers((64, 96), seed=9)
    moved = fake_quantize(tensor, scheme, 32)
    groups, after = tensor.double().view(64, 3, 32), moved.double().view(64, 3, 32)
    amax = groups.abs().amax(-1, keepdim=True)
    assert ((groups - after).abs() <= amax / (2 * levels) * (1 + 1e-6)).all()
    assert torch.equal(after.abs().amax(-1, keepdim=True), amax)
    assert {round(float(x)) for x in (after / amax * levels).flatten()} <= set(range(-levels, levels + 1))


@pytest.mark.parametrize("scheme", FORMATS)
def test_zeros_stay_zeros_and_so_does_nothing_at_all(scheme):
    assert torch.equal(fake_quantize(torch.zeros(3, 130), scheme), torch.zeros(3, 130))
    assert fake_quantize(torch.zeros(0, 4), scheme).shape == (0, 4)
    mixed = torch.zeros(2, 130)
    mixed[1, 129] = 0.7
    assert fake_quantize(mixed, scheme)[0].abs().max() == 0


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("scheme", ["fp8_e4m3", *INTEGERS])
def test_a_block_that_holds_no_number_is_none_as_a_whole_and_others_are_as_they_were(scheme, bad):
    tensor = numbers((129, 256))
    clean = fake_quantize(tensor, scheme, 128 if scheme in INTEGERS else None)
    tensor[0, 5] = bad
    broken = fake_quantize(tensor, scheme, 128 if scheme in INTEGERS else None)
    rows = slice(0, 128) if scheme == "fp8_e4m3" else slice(0, 1)
    assert broken[rows, :128].isnan().all()
    broken[rows, :128] = clean[rows, :128]
    assert torch.equal(broken, clean)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 2), "int5"), "scheme: is 'int5'"),
        ((torch.zeros(2, 2), "int8", 0), "group_size: is 0"),
        ((torch.zeros(2, 2), "fp8_e4m3", 32), "group_size: is 32 with fp8_e4m3"),
        ((torch.zeros(2, 2, dtype=torch.int64), "int8"), "tensor: holds int64"),
    ],
)
def test_what_cannot_be_rounded_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        fake_quantize(*arguments)


def test_a_recipe_names_every_format_there_is():
    choices = get_args(MismatchConfig.model_fields["weights"].annotation)
    assert sorted(choices) == sorted(["none", *FORMATS])


NAMES = {
    "model.embed_tokens.weight": False,
    "model.layers.0.self_attn.q_proj.weight": True,
    "model.layers.0.self_attn.o_proj.weight": True,
    "model.layers.0.self_attn.q_norm.weight": False,
    "model.layers.0.mlp.gate.weight": False,
    "model.layers.0.mlp.gate_proj.weight": True,
    "model.layers.0.mlp.experts.5.down_proj.weight": True,
    "model.norm.weight": False,
    "lm_head.weight": False,
}


def test_linear_layers_are_rounded_and_norms_embeddings_head_and_routers_are_not():
    dial = {"generation.mismatch.weights": "int4", "generation.mismatch.group_size": 4}
    for keys in (dial, {"quantization.scheme": "int4", "quantization.group_size": 4, "quantization.where": "rollout"}):
        quantizer = WeightQuantizer.of(PolicyConfig().with_values(keys))
        stream = {name: numbers((8, 12), seed) for seed, name in enumerate(NAMES)}
        for name, tensor in quantizer(stream.items()):
            assert torch.equal(tensor, fake_quantize(stream[name], "int4", 4) if NAMES[name] else stream[name]), name
    assert WeightQuantizer.of(PolicyConfig()) is None


def test_a_pattern_of_one_s_own_takes_matrices_alone_and_one_that_fits_nothing_is_an_error():
    stream = {"lm_head.weight": numbers((8, 12)), "model.norm.weight": numbers((12,)), "q_proj.weight": numbers((2, 2))}
    rounded = dict(WeightQuantizer("int3", "lm_head|norm")(stream.items()))
    assert [name for name in stream if not torch.equal(rounded[name], stream[name])] == ["lm_head.weight"]
    with pytest.raises(UserError, match="weights_pattern: 'k_proj' is found in no matrix's name"):
        list(WeightQuantizer("int3", "k_proj")(stream.items()))


class _DividesAsAGpu(TorchFunctionMode):
    """PyTorch's CUDA kernel multiplies by the rounded inverse of a divisor that is a plain number."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.div, torch.Tensor.__truediv__, torch.div) and not isinstance(args[1], torch.Tensor):
            return args[0] * (1.0 / args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", FORMATS)
def test_a_device_that_multiplies_by_inverses_rounds_no_number_otherwise(scheme, dtype):
    weight = numbers((300, 257), dtype=dtype)
    here = fake_quantize(weight, scheme)
    with _DividesAsAGpu():
        assert torch.equal(fake_quantize(weight, scheme), here)
