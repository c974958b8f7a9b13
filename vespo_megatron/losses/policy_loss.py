"""The policy loss −Σ φ·A·log π of one micro-batch, in four steps with a frozen result each, and its metrics.

check the inputs → `corrected_ratios` (sums over sequences, one all-reduce over context parallelism; a correction before
the clip) → `coefficient` (φ; a correction after it; what is dropped) → `loss_weights` (advantage, aggregation).

`compute_policy_loss` is the trainer's entry: dataclasses in, dataclass out, no wait of the host. `policy_loss` is the
same for people who train with something else.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vespo_megatron.errors import UserError
from vespo_megatron.losses.aggregation import Normalizer
from vespo_megatron.losses.coefficient import Coefficient, coefficient
from vespo_megatron.losses.config import PolicyLossConfig
from vespo_megatron.losses.corrected_ratios import CorrectedRatios, corrected_ratios
from vespo_megatron.losses.correction import CorrectionConfig
from vespo_megatron.losses.diagnostics import (
    SequenceView,
    correction_metrics,
    moved_metrics,
    sequence_metrics,
    token_metrics,
)
from vespo_megatron.losses.loss_inputs import CheckedInputs, LossInputs, check, check_log_probs
from vespo_megatron.losses.loss_output import LossOutput
from vespo_megatron.losses.loss_weights import loss_weights
from vespo_megatron.losses.metrics import MetricSums
from vespo_megatron.losses.ratios import Ratios
from vespo_megatron.losses.registry import Phi
from vespo_megatron.losses.regularization import regularization_terms
from vespo_megatron.losses.router_shift import RouterShift, check_router_shift, router_shift_metrics
from vespo_megatron.losses.weighted_sum import SequenceWeighted, TokenWeighted


def compute_policy_loss(
    inputs: LossInputs, config: PolicyLossConfig, normalizer: Normalizer | None = None
) -> LossOutput:
    """The loss of one micro-batch on this rank.

    Args:
        normalizer: global counts of the whole mini-batch; None: those of this micro-batch (over context parallelism).

    Raises:
        UserError: lengths that differ, a missing input, wrong offsets.
    """
    given = check(inputs, config)
    with torch.no_grad():
        corrected = corrected_ratios(given, config, normalizer)
        factors = coefficient(corrected, config)
        weights = loss_weights(corrected, factors, config, normalizer)
    if corrected.log_prob_sum is not None:
        loss = SequenceWeighted.apply(
            inputs.log_probs, weights.weight, corrected.log_prob_sum, given.sequences, given.mask
        )
    else:
        loss = TokenWeighted.apply(inputs.log_probs, weights.weight)
    metrics = MetricSums()
    if config.metrics == "full":
        with torch.no_grad():
            metrics = _metrics(given, corrected, factors, weights.coefficient)
            if config.router_shift is not None and given.router_shift is not None:
                valid = factors.valid_tokens()
                metrics = metrics + router_shift_metrics(given.router_shift, config.router_shift, valid)
    metrics.add("loss/policy", loss.detach(), 0.0)
    for name, factor, term in regularization_terms(inputs, config, factors, weights.scale):
        loss = loss + factor * term
        metrics.add(name, term.detach(), 0.0)
    # What makes φ [tokens] lives as long as the output: of token objectives that is φ alone.
    made = weights.coefficient
    return LossOutput(
        loss=loss,
        metrics=metrics,
        bad_sequences=factors.bad,
        sequence_log_ratio=corrected.ratios.sequence_log_ratio,
        config=config,
        _coefficient=factors.per_token if made is None else lambda: made,
    )


@torch.no_grad()
def compute_ratios(inputs: LossInputs, config: PolicyLossConfig) -> Ratios:
    """The ratios an objective would see, corrections included, for what looks at a whole mini-batch before its losses.

    Raises as `compute_policy_loss` does.
    """
    return corrected_ratios(check(inputs, config), config).ratios


@torch.no_grad()
def correction_counts(inputs: LossInputs, config: PolicyLossConfig) -> Tensor:
    """What a correction counts over a mini-batch, of this micro-batch: [4], additive over micro-batches and ranks.

    Kept tokens and sequences with any, of `denominator: kept`; the sum of weights and their number, of `normalize`.
    Sum them over everything that makes one update, then `Normalizer.corrected` has them.

    Raises as `compute_policy_loss` does.
    """
    corrected = corrected_ratios(check(inputs, config), config)
    kept = torch.where(corrected.bad, 0.0, corrected.kept_lengths)
    zero = kept.new_zeros(())
    counts = [kept.sum(), (kept > 0).sum().to(kept.dtype), corrected.weight_sum, corrected.weight_count]
    found = torch.stack([zero if count is None else count for count in counts]).to(torch.float64)
    return found if corrected.ratios.sequences.is_first_rank else torch.zeros_like(found)


def policy_loss(
    log_probs: Tensor,
    behavior_log_probs: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    name: str | Phi = "vespo",
    mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    aggregation: str = "token-mean",
    aggregation_length: float | None = None,
    num_tokens: float | None = None,
    normalizer: Normalizer | None = None,
    old_log_probs: Tensor | None = None,
    positions: Tensor | None = None,
    entropy: Tensor | None = None,
    router_shift: Tensor | None = None,
    router_shift_apply: str = RouterShift.apply,
    router_shift_floor: float = RouterShift.floor,
    advantage_level: str = "auto",
    correction: dict[str, Any] | None = None,
    on_bad_sample: str = "error",
    metrics: str = "full",
    **hyperparameters: Any,
) -> LossOutput:
    """Any objective of the family on packed tensors; see `LossInputs` for shapes.

    Args:
        log_probs: [tokens], log π_θ, with gradient.
        behavior_log_probs: [tokens], log μ.
        advantages: [num_sequences] or [tokens].
        cu_seqlens: int [num_sequences + 1].
        name: an objective (`objective_names()`), package.module:function, or a function φ(ratios, *, …).
        mask: bool [tokens].
        group: context parallel group, over which sequences are split.
        aggregation: token-mean, seq-mean-token-sum, seq-mean-token-mean, token-sum-norm.
        aggregation_length: the constant of token-sum-norm, in tokens.
        num_tokens: the global token count, where this call is a part of a larger batch and `aggregation` is token-mean.
        normalizer: the same for every aggregation.
        old_log_probs: [tokens], log π_old: the ratio becomes π_θ/π_old, and a correction is of π_old/μ.
        positions: int64 [tokens], for minpro under a group.
        entropy: [tokens], of the policy's own distribution, for `top_entropy_fraction`.
        router_shift: [tokens], γ of `losses.router_shift`: RSPO's weight of each token, with any objective.
        router_shift_apply: before_clip or after_clip.
        router_shift_floor: γ_min.
        advantage_level: sequence, token, or auto: by length.
        correction: as `loss_fn.correction` of a recipe.
        on_bad_sample: error or drop, for sequences with numbers that are not finite.
        metrics: full or none.
        hyperparameters: of the objective.

    Under `torch.compile` values are not looked at: call `raise_if_bad` on the output outside of it.

    Raises:
        UserError: unknown names; inputs of another type, length or device than they should be; log-probs above 0
            (of tensors in host memory); numbers that are not finite.
    """
    config = PolicyLossConfig(
        name=name,
        hyperparameters=hyperparameters,
        aggregation=aggregation,
        aggregation_length=aggregation_length,
        behavior="rollout" if old_log_probs is None else "recompute",
        correction=CorrectionConfig.from_mapping(correction),
        router_shift=None if router_shift is None else RouterShift(router_shift_apply, router_shift_floor),
        on_bad_sample=on_bad_sample,
        metrics=metrics,
    )
    inputs = LossInputs(
        log_probs,
        behavior_log_probs,
        advantages,
        cu_seqlens,
        mask=mask,
        old_log_probs=old_log_probs,
        positions=positions,
        entropy=entropy,
        router_shift=router_shift,
        group=group,
        advantage_level=advantage_level,
    )
    output = compute_policy_loss(inputs, config, _given_normalizer(num_tokens, normalizer, aggregation))
    if not torch.compiler.is_compiling():
        check_log_probs(inputs)
        check_router_shift(router_shift, mask)
        output.raise_if_bad()
    return output


def _given_normalizer(num_tokens: float | None, normalizer: Normalizer | None, aggregation: str) -> Normalizer | None:
    """`num_tokens` as a `Normalizer`, or the one that was given."""
    if num_tokens is None:
        return normalizer
    if normalizer is not None or aggregation != "token-mean":
        raise UserError(
            "fixes the denominator of token-mean alone",
            where="num_tokens",
            expected="normalizer=Normalizer(…) for another aggregation",
        )
    if not num_tokens > 0:
        raise UserError(f"is {num_tokens}", where="num_tokens", expected="the number of trained tokens, above 0")
    return Normalizer(num_tokens, 1.0)


def _metrics(
    given: CheckedInputs, corrected: CorrectedRatios, factors: Coefficient, per_token: Tensor | None
) -> MetricSums:
    """Everything of `diagnostics` for this micro-batch."""
    per_sequence = sequence_metrics(
        SequenceView(
            log_w=corrected.log_w,
            length=corrected.lengths,
            advantage=corrected.ratios.sequence_advantage,
            phi=factors.phi if factors.is_per_sequence else None,
            mismatch=corrected.mismatch,
            keep=~factors.bad & (corrected.lengths > 0),
        )
    )
    per_sequence.add("loss/bad_samples", factors.bad.sum(), 0.0)
    if corrected.has_correction:
        per_sequence = per_sequence + correction_metrics(corrected, factors.bad)
    if not given.sequences.is_first_rank:
        per_sequence = per_sequence.empty_like()
    tokens = token_metrics(
        given.log_probs if given.old_log_probs is None else given.old_log_probs,
        given.behavior_log_probs,
        factors.valid_tokens(),
        None if factors.is_per_sequence else factors.phi,
        per_token,
    )
    if given.anchored_to_old and given.old_log_probs is not None:
        tokens = tokens + moved_metrics(given.log_probs, given.old_log_probs, factors.valid_tokens())
    return per_sequence + tokens
