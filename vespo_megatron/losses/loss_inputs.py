"""Inputs of the policy loss: one packed micro-batch on this rank, checked and ready to compute with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from vespo_megatron.errors import UserError
from vespo_megatron.losses.config import PolicyLossConfig
from vespo_megatron.losses.one_line import OneLine
from vespo_megatron.losses.registry import unknown
from vespo_megatron.losses.sequence import PackedSequences


@dataclass(frozen=True, repr=False)
class LossInputs(OneLine):
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
    router_shift: Tensor | None = None
    """float [tokens], γ (or γ̃) of the routers since π_old; needed with `PolicyLossConfig.router_shift`."""


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
    corrects_old: bool
    """Whether a correction is of π_old/μ, not of π_θ/μ."""
    advantage: Tensor
    """[num_sequences] or [tokens]."""
    per_token_advantage: bool
    positions: Tensor | None
    """int64 [tokens], index of each token in its whole response."""
    entropy: Tensor | None = None
    """[tokens], detached; None where nothing asks for it."""
    router_shift: Tensor | None = None
    """[tokens], γ; None where nothing asks for it."""
    others: tuple[Tensor, ...] = ()
    """[tokens] each: what terms beside −Σ φ·A·log π look at; a number in them that is not finite is as bad."""

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
        UserError: what is no tensor, or of another length, type or device than it should be; a missing input.
    """
    _check_tensors(inputs)
    needed = {
        "old_log_probs": config.behavior != "rollout",
        "ref_log_probs": config.kl_coefficient != 0,
        "entropy": config.needs_entropy,
        "router_shift": config.router_shift is not None,
    }
    for name, is_needed in needed.items():
        if is_needed and getattr(inputs, name) is None:
            raise UserError("is missing", where=name, expected=f"[{len(inputs.log_probs)}]: loss_fn asks for it")
    sequences = PackedSequences(inputs.cu_seqlens, len(inputs.log_probs), inputs.log_probs.device, inputs.group)
    dtype = torch.float64 if inputs.log_probs.dtype == torch.float64 else torch.float32
    old_log_probs = inputs.old_log_probs
    others = [getattr(inputs, name) for name in ("ref_log_probs", "entropy", "router_shift") if needed[name]]
    return CheckedInputs(
        sequences=sequences,
        mask=inputs.mask,
        log_probs=inputs.log_probs.detach().to(dtype),
        behavior_log_probs=inputs.behavior_log_probs.detach().to(dtype),
        old_log_probs=None if old_log_probs is None else old_log_probs.detach().to(dtype),
        anchored_to_old=config.behavior != "rollout" and config.objective.anchor != "behavior",
        corrects_old=config.behavior != "rollout",
        advantage=inputs.advantages.detach().to(dtype),
        per_token_advantage=_advantage_per_token(inputs, sequences),
        positions=inputs.positions,
        entropy=inputs.entropy.detach().to(dtype) if needed["entropy"] and inputs.entropy is not None else None,
        router_shift=inputs.router_shift.detach().to(dtype)
        if needed["router_shift"] and inputs.router_shift is not None
        else None,
        others=tuple(other.detach().to(dtype) for other in others),
    )


_LOG_PROBS = ("log_probs", "behavior_log_probs", "old_log_probs", "ref_log_probs")
_FLOATING = (*_LOG_PROBS, "entropy", "router_shift", "advantages")
_OPTIONAL = ("mask", "old_log_probs", "ref_log_probs", "entropy", "router_shift", "positions")
_PER_TOKEN = ("log_probs", "behavior_log_probs", *_OPTIONAL)


def _check_tensors(inputs: LossInputs) -> None:
    """Type, number type, device and length of every input, by its name."""
    for name in (*_PER_TOKEN, "advantages", "cu_seqlens"):
        value = getattr(inputs, name)
        if value is None and name in _OPTIONAL:
            continue
        if not isinstance(value, Tensor):
            raise UserError(f"is a {type(value).__name__}", where=name, expected="a 1-D tensor")
        if name == "mask":
            if value.dtype != torch.bool:
                raise UserError(
                    f"is of {value.dtype}: a token is trained on or it is not",
                    where=name,
                    expected="a tensor of bool",
                    fix="mask.bool(), or mask > 0.5; a weight per token is a matter of the advantages",
                )
        elif name in _FLOATING:
            if not value.is_floating_point():
                raise UserError(f"is of {value.dtype}", where=name, expected="a tensor of floating point numbers")
        elif value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise UserError(f"is of {value.dtype}", where=name, expected="a tensor of integers")
    if inputs.log_probs.dim() != 1:
        raise UserError(
            f"has shape {tuple(inputs.log_probs.shape)}",
            where="log_probs",
            expected="[tokens]: responses packed one after another, 1-D",
            fix="vespo_megatron.losses.pack packs padded [batch, length] tensors",
        )
    tokens, device = inputs.log_probs.shape, inputs.log_probs.device
    for name in (*_PER_TOKEN, "advantages"):
        value = getattr(inputs, name)
        if value is None:
            continue
        if name in _PER_TOKEN and value.shape != tokens:
            raise UserError(
                f"has shape {tuple(value.shape)}",
                where=name,
                expected=f"[{tokens[0]}], as log_probs: packed, 1-D",
            )
        if value.device != device:
            raise UserError(f"is on {value.device}", where=name, expected=f"{device}, where log_probs is")
    if inputs.cu_seqlens.device not in (device, torch.device("cpu")):
        raise UserError(
            f"is on {inputs.cu_seqlens.device}", where="cu_seqlens", expected=f"in host memory, or on {device}"
        )


LARGEST_LOG_PROB = 0.01
"""A log-prob above this is no rounding: probabilities, or logits, were given."""


def check_log_probs(inputs: LossInputs) -> None:
    """Raise UserError for log-probs above 0, where that takes no wait for a device."""
    for name in _LOG_PROBS:
        values = getattr(inputs, name)
        if values is None or not values.is_cpu or not values.numel():
            continue
        values = values.detach()
        if inputs.mask is not None:
            values = torch.where(inputs.mask, values, 0.0)
        highest = float(values.nan_to_num(0.0, 0.0).max())
        if highest > LARGEST_LOG_PROB:
            raise UserError(
                f"holds {highest:.4g}",
                where=name,
                expected="logarithms of probabilities, which are at most 0",
                fix="give log-softmax values of the tokens, not probabilities or logits",
            )


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
    if count == tokens and not torch.compiler.is_compiling() and not _one_token_each(inputs.cu_seqlens):
        raise UserError(
            f"[{count}] may be one per sequence or one per token",
            where="advantages",
            expected="advantage_level='sequence' or 'token' where the numbers of sequences and tokens are equal",
        )
    return shape != (count,)


def _one_token_each(cu_seqlens: Tensor) -> bool:
    return torch.equal(cu_seqlens.cpu().long(), torch.arange(len(cu_seqlens)))
