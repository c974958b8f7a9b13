"""Second step of the policy loss: ratios per token and per sequence, with what weighs them before the clip."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vespo_megatron.losses.aggregation import Normalizer
from vespo_megatron.losses.config import PolicyLossConfig
from vespo_megatron.losses.correction import CorrectionConfig
from vespo_megatron.losses.correction.rejection import kept_sequences, kept_tokens
from vespo_megatron.losses.correction.weights import (
    Weights,
    log_mean_weight,
    sequence_weights,
    token_weights,
)
from vespo_megatron.losses.loss_inputs import CheckedInputs
from vespo_megatron.losses.ratio_sums import ratio_sums
from vespo_megatron.losses.ratios import LOG_RATIO_CLAMP, Ratios
from vespo_megatron.losses.sequence import SequenceSums


@dataclass(frozen=True)
class CorrectedRatios:
    """What is known of a micro-batch's ratios; per-sequence tensors are complete over context parallelism."""

    ratios: Ratios
    """What the objective sees."""
    lengths: Tensor
    """[num_sequences]: unmasked tokens, those a correction drops included."""
    kept_lengths: Tensor
    """[num_sequences]: those a correction keeps; 0 in a sequence it drops."""
    to_behavior: Tensor
    """[num_sequences]: Σ (log π_θ − log μ), unclamped and uncorrected."""
    log_w: Tensor
    """[num_sequences]: Σ (log π_θ − log π_anchor), unclamped and uncorrected: S before a correction."""
    mismatch: Tensor
    """[num_sequences]: Σ (log π_train − log μ); π_train is π_old where it is known, else π_θ."""
    bad: Tensor
    """bool [num_sequences]: a number of the sequence is not finite."""
    token_weights: Weights
    """[tokens]: what a correction and the router shift still do after the clip."""
    sequence_weights: Weights
    """[num_sequences]: the same."""
    has_correction: bool
    weight_sum: Tensor | None
    """[]: Σ of a correction's weights before they are normalised, over tokens or over sequences; bad ones left out."""
    weight_count: Tensor | None
    """[]: of how many."""
    log_prob_sum: Tensor | None
    """[num_sequences]: Σ log π_θ over this rank's unmasked tokens, where tokens matter through sums alone: then
    nothing of their size is made but the gradient. None where they matter one by one."""


@dataclass(frozen=True)
class _LocalSums:
    """What this rank's tokens give."""

    sums: SequenceSums
    token_weights: Weights
    log_ratio: Tensor | None = None
    """[tokens], clamped, with token weights before the clip in it; None where tokens matter through sums alone."""
    log_prob_sum: Tensor | None = None


def corrected_ratios(
    given: CheckedInputs, config: PolicyLossConfig, normalizer: Normalizer | None = None
) -> CorrectedRatios:
    """The ratios of one micro-batch; one all-reduce over context parallelism.

    Args:
        normalizer: its mean weight is what normalised weights are divided by; None: the mean over this micro-batch.
    """
    objective, correction = config.objective, config.correction
    of_tokens = objective.level == "token" or given.per_token_advantage or correction is not None
    of_tokens = of_tokens or config.masks_by_entropy or config.router_shift is not None
    through_sums = not of_tokens and not torch.compiler.is_compiling()  # which fuses the passes over tokens by itself
    local = _sums_alone(given) if through_sums else _tokens_and_sums(given, config)
    sums = replace(local.sums, others=_others(given)).over_context_parallel(given.sequences)
    mismatch = sums.log_w if sums.mismatch is None else sums.mismatch
    advantage = given.advantage if sums.advantage is None else sums.advantage / sums.length.clamp(min=1)
    bad = ~(sums.log_w.isfinite() & mismatch.isfinite() & _usable(advantage))
    if sums.others is not None:
        bad = bad | ~sums.others.isfinite()
    log_ratio, sequence_log_ratio, clamped = local.log_ratio, sums.log_ratio, sums.clamped_log_ratio
    weighed = _Weighed(local.token_weights, Weights())
    if correction is not None:
        weighed = _weighed(correction, local, sums, mismatch if given.corrects_old else sums.log_w, bad, normalizer)
        if config.correction_before_clip:  # the ratios get the weights in them; what is left out stays out
            of_token, of_sequence = weighed.shift(sums.kept if sums.kept is not None else sums.length)
            sequence_log_ratio, clamped = sequence_log_ratio + of_sequence, clamped + of_sequence
            if log_ratio is not None and objective.level == "token":
                log_ratio = given.masked(log_ratio + given.sequences.expand(of_token))
                log_ratio = weighed.token.kept(log_ratio)
            weighed = weighed.without_weights()
    kept = sums.length if sums.kept is None else sums.kept
    token_weights = weighed.token
    if config.router_shift is not None and given.router_shift is not None and not config.shifts_ratio:
        token_weights = token_weights.times(given.masked(config.router_shift.log_weight(given.router_shift)))
    ratios = Ratios(
        sequences=given.sequences,
        mask=given.mask,
        sequence_log_ratio=sequence_log_ratio,
        clamped_sequence_log_ratio=clamped,
        lengths=kept,
        advantage=given.advantage,
        sequence_advantage=advantage,
        per_token_advantage=given.per_token_advantage,
        log_probs=given.log_probs,
        behavior_log_probs=given.behavior_log_probs,
        old_log_probs=given.old_log_probs if given.anchored_to_old else None,
        positions=given.positions,
        entropy=given.entropy,
        bad=bad,
        corrected_log_ratio=log_ratio,
    )
    return CorrectedRatios(
        ratios=ratios,
        lengths=sums.length,
        kept_lengths=weighed.sequence.kept(kept),
        to_behavior=sums.log_w,
        log_w=_uncorrected(given, config, sums),
        mismatch=mismatch,
        bad=bad,
        token_weights=token_weights,
        sequence_weights=weighed.sequence,
        has_correction=correction is not None,
        weight_sum=weighed.total,
        weight_count=weighed.count,
        log_prob_sum=local.log_prob_sum,
    )


@dataclass(frozen=True)
class _Weighed:
    """What a correction does, complete over context parallelism."""

    token: Weights
    sequence: Weights
    log_mean: Tensor | None = None
    """[]: what token weights were divided by; None: nothing."""
    total: Tensor | None = None
    """[]: Σ of the weights before that, over tokens or over sequences; bad ones left out. None: no weight."""
    count: Tensor | None = None
    """[]: of how many."""

    def shift(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """[num_sequences] each: what is still to be added to each token's log-ratio, and to the sequence's.

        A sequence's weight enters once in S; a token objective sees it once in each token's own ratio. Token weights
        are in both already, but for what they are divided by.
        """
        if self.sequence.log_weight is not None:
            return self.sequence.log_weight, self.sequence.log_weight
        if self.log_mean is not None:
            return -self.log_mean.expand_as(kept), -self.log_mean * kept
        return torch.zeros_like(kept), torch.zeros_like(kept)

    def without_weights(self) -> _Weighed:
        """The same, with what is dropped alone."""
        return replace(
            self, token=replace(self.token, log_weight=None), sequence=replace(self.sequence, log_weight=None)
        )


def _weighed(
    correction: CorrectionConfig,
    local: _LocalSums,
    sums: SequenceSums,
    gap: Tensor,
    bad: Tensor,
    normalizer: Normalizer | None,
) -> _Weighed:
    """The correction of one micro-batch; `gap [num_sequences]` is Σ d."""
    sequence = sequence_weights(correction, gap, sums.length)
    token, log_mean, total, count = local.token_weights, None, None, None
    if correction.weighs:
        of_sequences = sequence.values() if sums.weight is None else sums.weight
        number = (sums.length > 0).to(gap.dtype) if sums.weight is None else sums.length
        total = torch.where(bad | (number == 0), 0.0, 0.0 if of_sequences is None else of_sequences).sum()
        count = torch.where(bad, 0.0, number).sum()
    if correction.normalize and total is not None and count is not None:
        if normalizer is not None and normalizer.mean_weight is not None:
            log_mean = log_mean_weight(torch.as_tensor(normalizer.mean_weight, dtype=gap.dtype, device=gap.device), 1.0)
        else:
            log_mean = log_mean_weight(total, count)
        token, sequence = token.divided(log_mean), sequence.divided(log_mean)
    sequence = sequence.dropping(kept_sequences(correction.rules, sums.judged, sums.length))
    return _Weighed(token, sequence, log_mean, total, count)


def _uncorrected(given: CheckedInputs, config: PolicyLossConfig, sums: SequenceSums) -> Tensor:
    """[num_sequences]: Σ (log π_θ − log π_anchor)."""
    if config.correction is None and not config.shifts_ratio:
        return sums.log_ratio
    return sums.log_w - sums.mismatch if given.anchored_to_old and sums.mismatch is not None else sums.log_w


def _usable(advantage: Tensor) -> Tensor:
    """bool: finite, and small enough that its product with the largest coefficient (two factors of e^20) is finite."""
    return (advantage * math.exp(2 * LOG_RATIO_CLAMP)).isfinite()


def _length(given: CheckedInputs) -> Tensor:
    """[num_sequences]: this rank's unmasked tokens."""
    if given.mask is None:
        return given.sequences.local_lengths.to(given.dtype)
    return given.sequences.local_sum(given.mask.to(given.dtype))


def _others(given: CheckedInputs) -> Tensor | None:
    """[num_sequences]: Σ of what other terms of the loss look at; None without any."""
    if not given.others:
        return None
    return given.sequences.local_sum(given.masked(torch.stack(given.others).sum(0)))


def _sums_alone(given: CheckedInputs) -> _LocalSums:
    """In one pass over the tokens, without a trace of them."""
    sequences, mask, old, behavior = given.sequences, given.mask, given.old_log_probs, given.behavior_log_probs
    anchor = old if old is not None and given.anchored_to_old else behavior
    found = ratio_sums(sequences, given.log_probs, anchor, mask, LOG_RATIO_CLAMP)
    log_w, mismatch = found.raw, None
    if old is not None:
        mismatch = ratio_sums(sequences, old, behavior, mask, LOG_RATIO_CLAMP).raw
        log_w = log_w + mismatch if given.anchored_to_old else log_w
    sums = SequenceSums(_length(given), log_w, found.raw, found.clamped, mismatch)
    return _LocalSums(sums, Weights(), log_prob_sum=found.log_probs)


def _tokens_and_sums(given: CheckedInputs, config: PolicyLossConfig) -> _LocalSums:
    """With the log-ratio of every token."""
    masked, local_sum, correction = given.masked, given.sequences.local_sum, config.correction
    old = given.old_log_probs
    to_behavior = masked(given.log_probs - given.behavior_log_probs)
    mismatch = None if old is None else masked(old - given.behavior_log_probs)
    log_ratio = masked(given.log_probs - old) if old is not None and given.anchored_to_old else to_behavior
    clamped = log_ratio.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    if config.router_shift is not None and given.router_shift is not None and config.shifts_ratio:
        shift = masked(config.router_shift.log_weight(given.router_shift))
        log_ratio, clamped = log_ratio + shift, clamped + shift
    weights, kept, weight = Weights(), None, None
    judged: tuple[Tensor, ...] = ()
    if correction is not None:
        gap = mismatch if mismatch is not None and given.corrects_old else to_behavior
        weights = token_weights(correction, gap)
        judged = tuple(local_sum(masked(rule.summed(gap))) for rule in correction.rules if rule.level != "token")
        if (of_tokens := weights.values()) is not None:
            weight = local_sum(masked(of_tokens))
        if config.correction_before_clip and weights.log_weight is not None:
            log_ratio, clamped = masked(log_ratio + weights.log_weight), masked(clamped + weights.log_weight)
        weights = weights.dropping(kept_tokens(correction.rules, gap))
        if weights.keep is not None:
            log_ratio, clamped = weights.kept(log_ratio), weights.kept(clamped)
            kept = local_sum(masked(weights.keep.to(given.dtype)))
    sums = SequenceSums(
        length=_length(given),
        log_w=local_sum(to_behavior),
        log_ratio=local_sum(log_ratio),
        clamped_log_ratio=local_sum(clamped),
        mismatch=None if mismatch is None else local_sum(mismatch),
        kept=kept,
        weight=weight,
        advantage=local_sum(masked(given.advantage)) if given.per_token_advantage else None,
        judged=judged,
    )
    return _LocalSums(sums, weights, clamped)
