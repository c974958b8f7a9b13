"""The policy loss: ratios → φ → correction → aggregation → −Σ φ·A·log π, with metrics.

`compute_policy_loss` is the trainer's entry: dataclasses in, dataclass out, one all-reduce over context parallelism
and no wait of the host. `policy_loss` is the same for people who train with something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vespo_megatron.errors import UserError
from vespo_megatron.losses import objectives
from vespo_megatron.losses.aggregation import Normalizer, sequence_scale
from vespo_megatron.losses.config import PolicyLossConfig
from vespo_megatron.losses.correction import CorrectionConfig, sequence_weight, token_weight
from vespo_megatron.losses.diagnostics import SequenceView, sequence_metrics, token_metrics
from vespo_megatron.losses.metrics import MetricSums
from vespo_megatron.losses.ratio_sums import ratio_sums
from vespo_megatron.losses.registry import LOG_RATIO_CLAMP, Ratios, unknown
from vespo_megatron.losses.sequence import PackedSequences, SequenceSums
from vespo_megatron.losses.weighted import SequenceWeighted, TokenWeighted


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


@dataclass
class LossOutput:
    """`loss` is this rank's share: shares of all ranks and micro-batches sum to the loss of the mini-batch."""

    loss: Tensor
    """[]: differentiable; −Σ φ·A·log π over this rank's tokens, over the global denominator, plus KL and entropy."""
    metrics: MetricSums
    bad_sequences: Tensor
    """bool [num_sequences], the same on every context parallel rank: a number in them is not finite."""
    sequence_log_ratio: Tensor
    """[num_sequences]: S = log W, the same on every context parallel rank."""
    config: PolicyLossConfig
    _coefficient: Any = field(repr=False)

    @cached_property
    def coefficient(self) -> Tensor:
        """[tokens]: φ with corrections, 0 where masked or dropped, detached."""
        return self._coefficient()

    def raise_if_bad(self, sample_ids: Sequence[str] | None = None) -> None:
        """Under `on_bad_sample: error`, raise for sequences with numbers that are not finite. Waits for the device.

        Raises:
            UserError: names the samples by `sample_ids`, or by their place in the micro-batch.
        """
        if self.config.on_bad_sample != "error":
            return
        bad = self.bad_sequences.nonzero().flatten().tolist()
        if bad:
            names = ", ".join(str(sample_ids[i]) if sample_ids is not None else f"sequence {i}" for i in bad)
            raise UserError(
                "has a log-prob or an advantage that is not finite",
                where=names if sample_ids is None else f"sample {names}",
                expected="finite numbers from the engine and the trainer",
                fix="look at the sample; loss_fn.on_bad_sample=drop goes on without it",
            )


def compute_policy_loss(
    inputs: LossInputs, config: PolicyLossConfig, normalizer: Normalizer | None = None
) -> LossOutput:
    """The loss of one micro-batch on this rank.

    Args:
        normalizer: global counts of the whole mini-batch; None: those of this micro-batch (over context parallelism).

    Raises:
        UserError: lengths that differ, a missing input, wrong offsets.
    """
    sequences = _check(inputs, config)
    with torch.no_grad():
        plan = _Plan(inputs, config, sequences)
        weight, coefficient = plan.weights(normalizer)
    if plan.by_sequence:
        loss = SequenceWeighted.apply(inputs.log_probs, weight, plan.log_prob_sum, sequences, plan.mask)
    else:
        loss = TokenWeighted.apply(inputs.log_probs, weight)
    metrics = MetricSums()
    if config.metrics == "full":
        with torch.no_grad():
            metrics = plan.metrics()
    metrics.add("loss/policy", loss.detach(), 0.0)
    for name, factor, term in plan.extra_terms():
        loss = loss + factor * term
        metrics.add(name, term.detach(), 0.0)
    return LossOutput(loss, metrics, plan.bad, plan.ratios.sequence_log_ratio, config, coefficient)


@torch.no_grad()
def compute_ratios(inputs: LossInputs, config: PolicyLossConfig) -> Ratios:
    """The ratios an objective would see, corrections included, for what looks at a whole mini-batch before its losses.

    Raises as `compute_policy_loss` does.
    """
    config = replace(config, name="reinforce", hyperparameters={})  # the ratios are no matter of the objective
    return _Plan(inputs, config, _check(inputs, config)).ratios


def policy_loss(
    log_probs: Tensor,
    behavior_log_probs: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    name: str = "vespo",
    mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    aggregation: str = "token-mean",
    num_tokens: float | None = None,
    normalizer: Normalizer | None = None,
    old_log_probs: Tensor | None = None,
    positions: Tensor | None = None,
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
        name: an objective (`objective_names()`), or package.module:function.
        mask: bool [tokens].
        group: context parallel group, over which sequences are split.
        aggregation: token-mean, seq-mean-token-sum, seq-mean-token-mean, token-sum-norm.
        num_tokens: the global token count, where this call is a part of a larger batch and `aggregation` is token-mean.
        normalizer: the same for every aggregation.
        old_log_probs: [tokens], log π_old: the ratio becomes π_θ/π_old and `correction` may be given.
        positions: int64 [tokens], for minpro under a group.
        correction: as `loss_fn.correction` of a recipe.
        on_bad_sample: error or drop, for sequences with numbers that are not finite.
        metrics: full or none.
        hyperparameters: of the objective.

    Raises:
        UserError: unknown names, lengths that differ, numbers that are not finite.
    """
    if num_tokens is not None:
        if normalizer is not None or aggregation != "token-mean":
            raise UserError(
                "fixes the denominator of token-mean alone",
                where="num_tokens",
                expected="normalizer=Normalizer(…) for another aggregation",
            )
        normalizer = Normalizer(num_tokens, 1.0)
    config = PolicyLossConfig(
        name=name,
        hyperparameters=hyperparameters,
        aggregation=aggregation,
        behavior="rollout" if old_log_probs is None else "recompute",
        correction=CorrectionConfig.from_mapping(correction),
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
        group=group,
    )
    output = compute_policy_loss(inputs, config, normalizer)
    output.raise_if_bad()
    return output


def _check(inputs: LossInputs, config: PolicyLossConfig) -> PackedSequences:
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


class _Plan:
    """Everything between the inputs and the weights of log π; built without gradient."""

    def __init__(self, inputs: LossInputs, config: PolicyLossConfig, sequences: PackedSequences) -> None:
        self.inputs, self.config, self.sequences = inputs, config, sequences
        self.mask = None if inputs.mask is None else inputs.mask.to(torch.bool)
        self.dtype = torch.float64 if inputs.log_probs.dtype == torch.float64 else torch.float32
        objective = config.objective
        self.per_token = _advantage_per_token(inputs, sequences)
        self.uses_old = config.behavior == "recompute" and objective.anchor != "behavior"
        log_probs, behavior, old = (
            None if t is None else t.detach().to(self.dtype)
            for t in (inputs.log_probs, inputs.behavior_log_probs, inputs.old_log_probs)
        )
        self.log_probs, self.behavior, self.old = log_probs, behavior, old
        advantages = inputs.advantages.detach().to(self.dtype)

        self.correction = config.correction
        self.before = False
        self.token_log_weight = self.token_keep = None
        self.by_sequence = objective.level == "sequence" and not self.per_token and config.correction is None
        """Whether tokens matter through sums alone: then nothing of their size is made but the gradient."""
        sums = SequenceSums(sequences, self.dtype)
        if self.mask is None:
            sums.add_local("length", sequences.local_lengths)
        else:
            sums.add("length", self.mask.to(self.dtype))
        ratio = self._add_sequence_sums(sums) if self.by_sequence else self._add_token_sums(sums)
        if self.per_token:
            sums.add("advantage", self._masked(advantages))
        sums.reduce()

        self.lengths = sums["length"]
        self.raw_sum = sums["raw"]
        self.gap_sum = sums["gap"] if old is not None else self.raw_sum
        self.sequence_advantage = sums["advantage"] / self.lengths.clamp(min=1) if self.per_token else advantages
        self.bad = ~(self.raw_sum.isfinite() & self.gap_sum.isfinite() & self.sequence_advantage.isfinite())
        self.sequence_log_weight = self.sequence_keep = None
        if self.correction is not None:
            self.sequence_log_weight, self.sequence_keep = sequence_weight(
                self.correction,
                sums["gap"],
                self.lengths,
                sums.get("vetoed"),
            )
        sequence_log_ratio = sums["ratio"]
        if self.before and self.sequence_log_weight is not None:
            # Once per sequence in S; a token objective sees it once in each token's own ratio.
            sequence_log_ratio = sequence_log_ratio + self.sequence_log_weight
            if objective.level == "token":
                ratio = self._masked(ratio + sequences.expand(self.sequence_log_weight))
        lengths = sums.get("kept", self.lengths)
        self.ratios = Ratios(
            sequences=sequences,
            mask=self.mask,
            sequence_log_ratio=sequence_log_ratio,
            lengths=lengths,
            advantage=advantages,
            sequence_advantage=self.sequence_advantage,
            per_token_advantage=self.per_token,
            log_probs=log_probs,
            behavior_log_probs=behavior,
            old_log_probs=old if self.uses_old else None,
            positions=inputs.positions,
            corrected_log_ratio=ratio,
        )
        hyperparameters = dict(config.hyperparameters)
        opsm_delta = hyperparameters.pop("opsm_delta", None)
        self.phi = objective.phi(self.ratios, **hyperparameters)
        self.sequence_factor = (~self.bad).to(self.dtype)
        if self.sequence_keep is not None:
            self.sequence_factor = self.sequence_factor * self.sequence_keep
        if not self.before and self.sequence_log_weight is not None:
            self.sequence_factor = self.sequence_factor * self.sequence_log_weight.exp()
        if opsm_delta is not None:
            self.sequence_factor = self.sequence_factor * objectives.opsm_keep(
                self.sequence_advantage, sequence_log_ratio, lengths, opsm_delta
            )

    def _add_sequence_sums(self, sums: SequenceSums) -> None:
        """Σ log π/μ ("raw"), Σ log π_old/μ ("gap", where π_old is known) and S ("ratio") without a token's trace."""
        anchor = self.old if self.uses_old else self.behavior
        found = ratio_sums(self.sequences, self.log_probs, anchor, self.mask, LOG_RATIO_CLAMP)
        self.log_prob_sum = found.log_probs
        sums.add_local("ratio", found.clamped)
        raw = found.raw
        if self.old is not None:
            gap = ratio_sums(self.sequences, self.old, self.behavior, self.mask, LOG_RATIO_CLAMP).raw
            sums.add_local("gap", gap)
            raw = raw + gap if self.uses_old else raw
        sums.add_local("raw", raw)

    def _add_token_sums(self, sums: SequenceSums) -> Tensor:
        """The same sums, and those of a correction. Returns the log-ratio of every token, clamped and corrected."""
        raw = self._masked(self.log_probs - self.behavior)
        sums.add("raw", raw)
        if self.old is not None:
            gap = self._masked(self.old - self.behavior)
            sums.add("gap", gap)
        ratio = self._masked(self.log_probs - self.old) if self.uses_old else raw
        ratio = ratio.clamp_(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
        if self.correction is not None:
            self.before = (self.correction.apply or self.config.objective.correction_apply) == "before_clip"
            self.token_log_weight, self.token_keep = token_weight(self.correction, gap)
            if self.correction.veto_threshold is not None:
                vetoed = gap.exp() < self.correction.veto_threshold
                sums.add("vetoed", self._masked(vetoed.to(self.dtype)))
            if self.before and self.token_log_weight is not None:
                ratio = ratio + self.token_log_weight
            if self.token_keep is not None:
                ratio = torch.where(self.token_keep, ratio, 0.0)
                sums.add("kept", self._masked(self.token_keep.to(self.dtype)))
        sums.add("ratio", ratio)
        return ratio

    def _masked(self, values: Tensor) -> Tensor:
        return values if self.mask is None else torch.where(self.mask, values, 0.0)

    def _token_factor(self, values: Tensor) -> Tensor:
        """Apply what acts per token to `values [tokens]`, which this may change."""
        if self.token_keep is not None:
            values = values * self.token_keep
        if not self.before and self.token_log_weight is not None:
            values = values * self.token_log_weight.exp()
        return self._masked(values)

    def _per_sequence(self, values: Tensor) -> Tensor:
        """0 in dropped sequences even where `values [num_sequences]` is NaN."""
        return torch.where(self.bad, 0.0, values)

    def _coefficient(self) -> Tensor:
        if self.config.objective.level == "sequence":
            return self._token_factor(self.sequences.expand(self._per_sequence(self.phi * self.sequence_factor)))
        factor = self.sequences.expand(self.sequence_factor)
        return self._token_factor(torch.where(factor == 0, 0.0, self.phi * factor))

    def weights(self, normalizer: Normalizer | None) -> tuple[Tensor, Any]:
        """The weight of log π ([num_sequences] if `by_sequence`, else [tokens]), and what makes φ [tokens]."""
        if normalizer is None:
            normalizer = Normalizer(self.lengths.sum(), (self.lengths > 0).sum(), self.config.aggregation_length)
        elif normalizer.length is None and self.config.aggregation_length is not None:
            normalizer = Normalizer(normalizer.num_tokens, normalizer.num_sequences, self.config.aggregation_length)
        self.scale = sequence_scale(self.config.aggregation, normalizer, self.lengths)
        if self.config.objective.level == "sequence" and not self.per_token:
            weight = self._per_sequence(self.phi * self.sequence_factor * self.sequence_advantage * self.scale)
            self.coefficient = None
            return weight if self.by_sequence else self._token_factor(self.sequences.expand(weight)), self._coefficient
        self.coefficient = self._coefficient()
        advantage = self.ratios.advantage if self.per_token else None
        factor = self.scale if self.per_token else self.scale * self.sequence_advantage
        weight = self.coefficient * self.sequences.expand(self._per_sequence(factor))
        if advantage is not None:
            weight = weight * torch.where(self.coefficient == 0, 0.0, advantage)
        coefficient = self.coefficient
        return weight, lambda: coefficient

    def metrics(self) -> MetricSums:
        """Everything of `diagnostics` for this micro-batch."""
        is_sequence = self.config.objective.level == "sequence"
        keep = ~self.bad & (self.lengths > 0)
        per_sequence = sequence_metrics(
            SequenceView(
                self.raw_sum,
                self.lengths,
                self.sequence_advantage,
                self.phi if is_sequence else None,
                self.gap_sum,
                keep,
            )
        )
        per_sequence.add("loss/bad_samples", self.bad.sum(), 0.0)
        if not self.sequences.is_first_rank:
            per_sequence = per_sequence.empty_like()
        per_token = token_metrics(
            self.sequences,
            self.log_probs if self.old is None else self.old,
            self.behavior,
            self._valid(),
            None if is_sequence else self.phi,
            self.coefficient,
        )
        return per_sequence + per_token

    def _valid(self) -> Tensor | None:
        """bool [tokens]: neither masked nor of a dropped sequence; None: every token (known without a wait)."""
        if self.sequences.on_host and not self.bad.any():
            return self.mask
        kept = self.sequences.expand(~self.bad)
        return kept if self.mask is None else kept & self.mask

    def extra_terms(self) -> list[tuple[str, float, Tensor]]:
        """(metric, factor, differentiable term) of the KL penalty and the entropy bonus."""
        config, inputs = self.config, self.inputs
        terms: list[tuple[str, float, Tensor]] = []
        if not config.kl_coefficient and not config.entropy_coefficient:
            return terms
        valid = self._valid()
        scale = self.sequences.expand(self._per_sequence(self.scale))

        def kept(values: Tensor) -> Tensor:
            values = values.to(self.dtype)
            return values if valid is None else torch.where(valid, values, 0.0)

        if config.kl_coefficient:
            kl = kl_estimate(kept(inputs.log_probs), kept(inputs.ref_log_probs.detach()), config.kl_type)
            terms.append(("loss/kl", config.kl_coefficient, (scale * kl).sum()))
        if config.entropy_coefficient:
            terms.append(("loss/entropy", -config.entropy_coefficient, (scale * kept(inputs.entropy)).sum()))
        return terms


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, kind: str) -> Tensor:
    """Per-token estimate of KL(π_θ‖π_ref), differentiable in `log_probs`, shapes as given.

    With r = log π_ref − log π_θ (Schulman, "Approximating KL divergence"): k1 = −r, k2 = r²/2, k3 = e^r − 1 − r.
    r is clamped to ±20.
    """
    r = (ref_log_probs - log_probs).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    if kind == "k1":
        return -r
    if kind == "k2":
        return r**2 / 2
    return torch.expm1(r) - r
