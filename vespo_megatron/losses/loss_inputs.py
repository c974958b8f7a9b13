"""Inputs of the policy loss: one packed micro-batch on this rank, checked and ready to compute with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from vespo_megatron.errors import UserError
from vespo_megatron.losses.config import PolicyLossConfig
from vespo_megatron.losses.registry import unknown
from vespo_megatron.losses.sequence import PackedSequences


@dataclass(frozen=True)
class LossInputs:
    """One micro-batch on this rank, packed: response tokens only, sequences one after another.

    With context parallelism `[tokens]` are this rank's tokens and `cu_seqlens` offsets into them; a sequence may have
    none here. Values of masked tokens are never looked at, NaN included.
    """

    log_probs: Tensor
    """float [tokens], log π_θ, with gradient."""
    behavior_log_probs: Tensor
    """float [tokens], log μ."""
    advantages: Tensor
    """float [num_sequences] or [tokens]."""
    cu_seqlens: Tensor
    """int [num_sequences + 1]; keep it in host memory and it is checked without waiting for the device."""
    mask: Tensor | None = None
    """bool [tokens]; None: every token is trained on."""
    old_log_probs: Tensor | None = None
    """float [tokens], log π_old; needed in behaviour mode recompute, and used for the mismatch metrics."""
    ref_log_probs: Tensor | None = None
    """float [tokens], log π_ref; needed for the KL penalty."""
    entropy: Tensor | None = None
    """float [tokens], with gradient; needed for the entropy bonus."""
    positions: Tensor | None = None
    """int64 [tokens], index of each token in its whole response; minpro needs it under context parallelism."""
    group: dist.ProcessGroup | None = None
    """Context parallel group."""
    advantage_level: str = "auto"
    """sequence, token, or auto: by length (an error where the two lengths are equal and it matters)."""


@dataclass(frozen=True)
class CheckedInputs:
    """`LossInputs` that fit together; tensors are detached, in float64 if log π_θ is, else in float32."""

    sequences: PackedSequences
    mask: Tensor | None
    """bool [tokens]; None: every token counts."""
    log_probs: Tensor
    """[tokens]: log π_θ."""
    behavior_log_probs: Tensor
    """[tokens]: log μ."""
    old_log_probs: Tensor | None
    """[tokens]: log π_old; None where it is not known."""
    anchored_to_old: bool
    """Whether ratios are taken against π_old, not μ."""
    advantage: Tensor
    """[num_sequences] or [tokens]."""
    per_token_advantage: bool
    positions: Tensor | None
    """int64 [tokens], index of each token in its whole response."""

    @property
    def dtype(self) -> torch.dtype:
        """The type everything is computed in."""
        return self.log_probs.dtype

    def masked(self, values: Tensor) -> Tensor:
        """`values [tokens]`, 0 where masked."""
        return values if self.mask is None else torch.where(self.mask, values, 0.0)


def check(inputs: LossInputs, config: PolicyLossConfig) -> CheckedInputs:
    """The inputs, ready to compute with.

    Raises:
        UserError: lengths that differ, a missing input, wrong offsets.
    """
    sequences = _packed_sequences(inputs, config)
    per_token_advantage = _advantage_per_token(inputs, sequences)
    dtype = torch.float64 if inputs.log_probs.dtype == torch.float64 else torch.float32
    old_log_probs = inputs.old_log_probs
    return CheckedInputs(
        sequences=sequences,
        mask=None if inputs.mask is None else inputs.mask.to(torch.bool),
        log_probs=inputs.log_probs.detach().to(dtype),
        behavior_log_probs=inputs.behavior_log_probs.detach().to(dtype),
        old_log_probs=None if old_log_probs is None else old_log_probs.detach().to(dtype),
        anchored_to_old=config.behavior == "recompute" and config.objective.anchor != "behavior",
        advantage=inputs.advantages.detach().to(dtype),
        per_token_advantage=per_token_advantage,
        positions=inputs.positions,
    )


def _packed_sequences(inputs: LossInputs, config: PolicyLossConfig) -> PackedSequences:
    num_tokens = len(inputs.log_probs)
    for name in ("log_probs", "behavior_log_probs", "mask", "old_log_probs", "ref_log_probs", "entropy", "positions"):
        tensor = getattr(inputs, name)
        if tensor is not None and tensor.shape != (num_tokens,):
            raise UserError(
                f"has shape {tuple(tensor.shape)}", where=name, expected=f"[{num_tokens}], as log_probs: packed, 1-D"
            )
    needed = {
        "old_log_probs": config.behavior == "recompute",
        "ref_log_probs": config.kl_coefficient != 0,
        "entropy": config.entropy_coefficient != 0,
    }
    for name, is_needed in needed.items():
        if is_needed and getattr(inputs, name) is None:
            raise UserError("is missing", where=name, expected=f"[{num_tokens}]: loss_fn asks for it")
    return PackedSequences(inputs.cu_seqlens, num_tokens, inputs.log_probs.device, inputs.group)


def _advantage_per_token(inputs: LossInputs, sequences: PackedSequences) -> bool:
    shape, tokens, count = tuple(inputs.advantages.shape), sequences.num_tokens, sequences.num_sequences
    expected = {"sequence": [(count,)], "token": [(tokens,)], "auto": [(count,), (tokens,)]}
    if inputs.advantage_level not in expected:
        raise unknown("advantage_level", inputs.advantage_level, expected, where="advantage_level")
    if shape not in expected[inputs.advantage_level]:
        raise UserError(
            f"has shape {shape}",
            where="advantages",
            expected=f"[{count}], one per sequence, or [{tokens}], one per token",
        )
    if inputs.advantage_level != "auto":
        return inputs.advantage_level == "token"
    if count == tokens and not torch.equal(inputs.cu_seqlens.cpu().long(), torch.arange(count + 1)):
        raise UserError(
            f"[{count}] may be one per sequence or one per token",
            where="advantages",
            expected="advantage_level='sequence' or 'token' where the numbers of sequences and tokens are equal",
        )
    return shape != (count,)
