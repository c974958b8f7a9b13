"""The policy on the device against transformers on the host: log-probs, entropies, gradients."""

from __future__ import annotations

import pytest
import torch
from gpu_policy import Transformers, by_sample, gradients, make_batch, make_checkpoint, make_policy, micro_batches

HOST = torch.device("cpu")


@pytest.mark.parametrize("changes", [{}, {"moe_grouped_gemm": False}, {"moe_token_dispatcher_type": "allgather"}])
def test_float32_is_transformers_float32(changes, rank_info, tiny_folder, close):
    policy, batch = make_policy(tiny_folder, rank_info, **changes), make_batch()
    assert not torch.backends.cuda.matmul.allow_tf32
    batches = micro_batches(policy, batch)
    found = by_sample(batches, policy.log_probs(batches))
    theirs = Transformers(tiny_folder, torch.float64, HOST)
    for name, wanted in theirs.scores(batch).items():
        close(f"scores of {name}", found[name], wanted, 5e-6)
    wanted = theirs.gradients(batch)
    ours = gradients(policy, batches)
    assert ours.keys() == wanted.keys()
    for name, gradient in wanted.items():
        close(f"gradient of {name}", ours[name], gradient, 1e-4)


def errors(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> torch.Tensor:
    """|log-prob − the exact one| of every token."""
    return torch.cat([(found[name].cpu().double() - wanted[name].double())[0].abs() for name in wanted])


WIDE = dict(
    hidden_size=256,
    intermediate_size=512,
    moe_intermediate_size=128,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=128,
    num_experts=32,
    num_experts_per_tok=8,
)
"""Nearer to the shapes of real models; in transformers' float64 too slow for the host."""


@pytest.mark.parametrize("size", ["tiny", pytest.param("wide", marks=pytest.mark.cuda)])
def test_bfloat16_is_as_near_as_transformers_bfloat16(size, device, rank_info, tiny_folder, note, tmp_path):
    """Both against float64 at the same, rounded, weights. Medians, since a token whose experts flip is far off."""
    lengths = ((4, 60),) * 8
    if size == "wide":
        tiny_folder, lengths = make_checkpoint(tmp_path, **WIDE), ((30, 220), (5, 240), (100, 100), (1, 37))
    policy, batch = make_policy(tiny_folder, rank_info, "bfloat16"), make_batch(lengths=lengths)
    batches = micro_batches(policy, batch)
    exact = Transformers(tiny_folder, torch.float64, device, rounded=torch.bfloat16)
    wanted = exact.scores(batch)
    ours = errors(by_sample(batches, policy.log_probs(batches)), wanted)
    theirs = errors(Transformers(tiny_folder, torch.bfloat16, device, rounded=torch.bfloat16).scores(batch), wanted)
    note(**{"median of ours": float(ours.median())})
    note(**{"median of transformers'": float(theirs.median())})
    assert ours.isfinite().all()
    assert ours.median() <= 1.3 * theirs.median(), f"{ours.median():.3g} where transformers has {theirs.median():.3g}"
    assert ours.mean() <= 2 * theirs.mean(), f"{ours.mean():.3g} where transformers has {theirs.mean():.3g}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_16_bits_are_as_near_as_transformers(dtype, device, rank_info, tiny_folder, note):
    """Those of float16 with the loss scale taken out; transformers has none, and underflows a little."""
    policy, batch = make_policy(tiny_folder, rank_info, str(dtype)[6:]), make_batch()
    ours = gradients(policy, micro_batches(policy, batch))
    wanted = Transformers(tiny_folder, torch.float64, HOST, rounded=dtype).gradients(batch)
    theirs = Transformers(tiny_folder, dtype, device, rounded=dtype).gradients(batch)

    def error(found: dict[str, torch.Tensor]) -> float:
        """Of all weights together."""
        apart = sum(float((found[name].cpu().double() - wanted[name].double()).square().sum()) for name in wanted)
        return (apart / sum(float(each.double().square().sum()) for each in wanted.values())) ** 0.5

    note(ours=error(ours))
    note(**{"transformers'": error(theirs)})
    assert error(ours) <= 1.5 * error(theirs), f"{error(ours):.3g} where transformers has {error(theirs):.3g}"
