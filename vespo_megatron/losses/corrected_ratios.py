"""Second step of the policy loss: ratios per token and per sequence, with a correction before the clip in them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vespo_megatron.losses.config import PolicyLossConfig
from vespo_megatron.losses.correction import NO_WEIGHTS, CorrectionConfig, Weights, sequence_weights, token_weights
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
    log_w: Tensor
    """[num_sequences]: Σ (log π_θ − log μ), unclamped and uncorrected."""
    mismatch: Tensor
    """[num_sequences]: Σ (log π_train − log μ); π_train is π_old where it is known, else π_θ."""
    bad: Tensor
    """bool [num_sequences]: a number of the sequence is not finite."""
    token_weights: Weights
    """[tokens]: what a correction still does after the clip."""
    sequence_weights: Weights
    """[num_sequences]: the same."""
    log_prob_sum: Tensor | None
    """[num_sequences]: Σ log π_θ over this rank's unmasked tokens, where tokens matter through sums alone: then
    nothing of their size is made but the gradient. None where they matter one by one."""

    def valid_tokens(self) -> Tensor | None:
        """bool [tokens]: neither masked nor of a bad sequence; None: every token (known without a wait)."""
        sequences, mask = self.ratios.sequences, self.ratios.mask
        if sequences.on_host and not self.bad.any():
            return mask
        good = sequences.expand(~self.bad)
        return good if mask is None else good & mask


@dataclass(frozen=True)
class _LocalSums:
    """What this rank's tokens give."""

    sums: SequenceSums
    log_ratio: Tensor | None = None
    """[tokens], clamped, with token weights before the clip in it; None where tokens matter through sums alone."""
    log_prob_sum: Tensor | None = None
    token_weights: Weights = NO_WEIGHTS


def corrected_ratios(given: CheckedInputs, config: PolicyLossConfig) -> CorrectedRatios:
    """The ratios of one micro-batch; one all-reduce over context parallelism."""
    objective, correction, sequences = config.objective, config.correction, given.sequences
    before_clip = config.correction_before_clip
    through_sums = objective.level == "sequence" and not given.per_token_advantage and correction is None
    local = _sums_alone(given) if through_sums else _tokens_and_sums(given, correction, before_clip)
    sums = local.sums.over_context_parallel(sequences)
    mismatch = sums.log_w if sums.mismatch is None else sums.mismatch
    advantage = given.advantage if sums.advantage is None else sums.advantage / sums.length.clamp(min=1)
    per_token, per_sequence = local.token_weights, NO_WEIGHTS
    if correction is not None:
        per_sequence = sequence_weights(correction, mismatch, sums.length, sums.vetoed)
    log_ratio, sequence_log_ratio = local.log_ratio, sums.log_ratio
    if before_clip and per_sequence.log_weight is not None:
        # Once per sequence in S; a token objective sees it once in each token's own ratio.
        sequence_log_ratio = sequence_log_ratio + per_sequence.log_weight
        if objective.level == "token" and log_ratio is not None:
            log_ratio = given.masked(log_ratio + sequences.expand(per_sequence.log_weight))
    if before_clip:  # the ratios have the weights in them; what is left out stays out
        per_token, per_sequence = replace(per_token, log_weight=None), replace(per_sequence, log_weight=None)
    ratios = Ratios(
        sequences=sequences,
        mask=given.mask,
        sequence_log_ratio=sequence_log_ratio,
        lengths=sums.length if sums.kept is None else sums.kept,
        advantage=given.advantage,
        sequence_advantage=advantage,
        per_token_advantage=given.per_token_advantage,
        log_probs=given.log_probs,
        behavior_log_probs=given.behavior_log_probs,
        old_log_probs=given.old_log_probs if given.anchored_to_old else None,
        positions=given.positions,
        corrected_log_ratio=log_ratio,
    )
    return CorrectedRatios(
        ratios=ratios,
        lengths=sums.length,
        log_w=sums.log_w,
        mismatch=mismatch,
        bad=~(sums.log_w.isfinite() & mismatch.isfinite() & advantage.isfinite()),
        token_weights=per_token,
        sequence_weights=per_sequence,
        log_prob_sum=local.log_prob_sum,
    )


def _length(given: CheckedInputs) -> Tensor:
    """[num_sequences]: this rank's unmasked tokens."""
    if given.mask is None:
        return given.sequences.local_lengths.to(given.dtype)
    return given.sequences.local_sum(given.mask.to(given.dtype))


def _sums_alone(given: CheckedInputs) -> _LocalSums:
    """In one pass over the tokens, without a trace of them."""
    sequences, mask, old, behavior = given.sequences, given.mask, given.old_log_probs, given.behavior_log_probs
    anchor = old if old is not None and given.anchored_to_old else behavior
    found = ratio_sums(sequences, given.log_probs, anchor, mask, LOG_RATIO_CLAMP)
    log_w, mismatch = found.raw, None
    if old is not None:
        mismatch = ratio_sums(sequences, old, behavior, mask, LOG_RATIO_CLAMP).raw
        log_w = log_w + mismatch if given.anchored_to_old else log_w
    return _LocalSums(SequenceSums(_length(given), log_w, found.clamped, mismatch), log_prob_sum=found.log_probs)


def _tokens_and_sums(given: CheckedInputs, correction: CorrectionConfig | None, before_clip: bool) -> _LocalSums:
    """With the log-ratio of every token."""
    masked, local_sum = given.masked, given.sequences.local_sum
    old, log_ratio = given.old_log_probs, masked(given.log_probs - given.behavior_log_probs)
    log_w, mismatch, mismatch_sum = local_sum(log_ratio), None, None
    if old is not None:
        mismatch = masked(old - given.behavior_log_probs)
        mismatch_sum = local_sum(mismatch)
        if given.anchored_to_old:
            log_ratio = masked(given.log_probs - old)
    log_ratio = log_ratio.clamp_(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    weights, vetoed, kept = NO_WEIGHTS, None, None
    if correction is not None and mismatch is not None:
        weights = token_weights(correction, mismatch)
        if correction.veto_threshold is not None:
            vetoed = local_sum(masked((mismatch.exp() < correction.veto_threshold).to(given.dtype)))
        if before_clip and weights.log_weight is not None:
            log_ratio = masked(log_ratio + weights.log_weight)
        if weights.keep is not None:
            log_ratio = torch.where(weights.keep, log_ratio, 0.0)
            kept = local_sum(masked(weights.keep.to(given.dtype)))
    advantage = local_sum(masked(given.advantage)) if given.per_token_advantage else None
    sums = SequenceSums(_length(given), log_w, local_sum(log_ratio), mismatch_sum, vetoed, kept, advantage)
    return _LocalSums(sums, log_ratio, token_weights=weights)
