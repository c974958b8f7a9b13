"""From a recipe's `loss_fn` to the function the policy calls on every micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from vespo_megatron.losses import (
    LossInputs,
    LossOutput,
    MetricSums,
    Normalizer,
    PolicyLossConfig,
    compute_policy_loss,
    compute_ratios,
    correction_counts,
)
from vespo_megatron.losses.search import found_in
from vespo_megatron.megatron.micro_batch import MicroBatch
from vespo_megatron.megatron.parallel import context_parallel_group, data_context_parallel_group
from vespo_megatron.megatron.policy import LossFunction, MegatronPolicy, RouteUse
from vespo_megatron.recipe.schema import LossConfig


def add_by_lag(output: LossOutput, lags: np.ndarray, max_lag: int, *, first: bool) -> None:
    """Mean W and W² of the sequences of each lag up to `max_lag`: the same names on every rank.

    Args:
        lags: int64 [num_sequences]
        first: whether this is the first context parallel rank, which alone reports what all of them know.
    """
    weight = output.sequence_log_ratio.double().exp()
    finite = torch.isfinite(weight)
    for lag in range(max_lag + 1):
        where = torch.from_numpy(lags == lag).to(weight.device, non_blocking=True) & finite & first
        counted = torch.where(where, weight, 0.0)
        output.metrics.add(f"staleness/w_mean_lag_{lag}", counted.sum(), where.sum())
        output.metrics.add(f"_w_square_lag_{lag}", counted.square().sum(), where.sum())


class Objective:
    """The loss of one recipe, bound to this rank's context parallel group.

    Args:
        behavior: `Recipe.behavior`.
        max_lag: of an asynchronous run, whose batches have lags; W is then reported by lag as well.
    """

    def __init__(self, loss_fn: LossConfig, behavior: str, max_lag: int | None = None) -> None:
        self.config, self.max_lag = PolicyLossConfig.from_recipe(loss_fn, behavior), max_lag
        self.group = context_parallel_group()

    @property
    def needs_old_log_probs(self) -> bool:
        """Whether π_old by the training engine is part of the objective."""
        return self.config.behavior != "rollout"

    @property
    def needs_reference(self) -> bool:
        """Whether log-probs of the initial policy are part of the objective."""
        return self.config.kl_coefficient != 0

    @property
    def needs_router_shift(self) -> bool:
        """Whether how far the routers have moved since π_old is part of the objective."""
        return self.config.router_shift is not None

    def over_mini_batch(
        self, policy: MegatronPolicy, micro_batches: Sequence[MicroBatch], routes: RouteUse, normalizer: Normalizer
    ) -> tuple[PolicyLossConfig, Normalizer]:
        """The configuration and the counts of one mini-batch, with what holds for all of it; a collective.

        What an objective searches for depends on π_θ over the whole mini-batch, as does what a correction keeps of
        π_θ/μ (behaviour `rollout`): one forward pass for both. What a correction keeps of π_old/μ is known. The same
        pass measures the router shift, which no loss could wait for where pipeline stages hold layers of their own.
        """
        searches, correction = self.config.searches, self.config.correction
        counts = correction is not None and correction.needs_mini_batch
        known = self.needs_old_log_probs
        shift = self.needs_router_shift and policy.rank_info.pipeline_size > 1
        passes = bool(searches) or (counts and not known) or shift
        scores = policy.log_probs(micro_batches, routes=routes) if passes else []
        if not policy.rank_info.is_last_stage:
            return self.config, normalizer
        group, config = data_context_parallel_group(), self.config
        scored = [
            self._inputs(score[0], score[1], micro_batch)
            for score, micro_batch in zip(scores, micro_batches, strict=bool(scores))
        ]
        if searches:
            ratios = [compute_ratios(inputs, self.config) for inputs in scored]
            found = {name: value.item() for each in searches for name, value in found_in(each, ratios, group).items()}
            config = replace(config, hyperparameters={**config.hyperparameters, **found})
        if correction is not None and counts:
            total = torch.zeros(4, dtype=torch.float64, device=policy.rank_info.device)
            for inputs in self._old_inputs(micro_batches) if known else scored:
                total += correction_counts(inputs, self.config)
            dist.all_reduce(total, group=group)
            normalizer = normalizer.corrected(total, kept=correction.denominator == "kept")
        return config, normalizer

    def _old_inputs(self, micro_batches: Sequence[MicroBatch]) -> list[LossInputs]:
        """Of π_old in place of π_θ, which the counts of π_old/μ do not look at."""
        old = [(micro_batch.old_log_probs, micro_batch) for micro_batch in micro_batches]
        return [
            replace(self._inputs(values, values, micro_batch), router_shift=torch.ones_like(values))
            for values, micro_batch in old
            if values is not None
        ]

    def _inputs(self, log_probs: torch.Tensor, entropies: torch.Tensor, micro_batch: MicroBatch) -> LossInputs:
        return LossInputs(
            log_probs=log_probs,
            behavior_log_probs=micro_batch.behavior_log_probs,
            advantages=micro_batch.advantages,
            cu_seqlens=micro_batch.cu_seqlens,
            mask=micro_batch.mask,
            old_log_probs=micro_batch.old_log_probs,
            ref_log_probs=micro_batch.ref_log_probs,
            entropy=entropies,
            router_shift=micro_batch.router_shift,
            positions=micro_batch.response_positions,
            group=self.group,
            advantage_level=micro_batch.advantage_level,
        )

    def loss_function(self, normalizer: Normalizer, config: PolicyLossConfig | None = None) -> LossFunction:
        """The loss of one mini-batch; `normalizer` holds its global counts, `config` comes from `over_mini_batch`."""
        config = config or self.config

        def loss(log_probs: torch.Tensor, entropies: torch.Tensor, micro_batch: MicroBatch) -> tuple[torch.Tensor, Any]:
            output = compute_policy_loss(self._inputs(log_probs, entropies, micro_batch), config, normalizer)
            output.metrics.add("policy/entropy", (entropies.detach() * micro_batch.mask).sum(), micro_batch.mask.sum())
            lags = micro_batch.batch.lags
            if self.max_lag is not None and lags is not None:
                add_by_lag(output, lags, self.max_lag, first=self.group.rank() == 0)
            return output.loss, (output, micro_batch)

        return loss

    @staticmethod
    def raise_if_bad(reports: Sequence[tuple[LossOutput, MicroBatch]]) -> None:
        """Under `on_bad_sample: error`, name the samples whose numbers are not finite (before the optimizer steps)."""
        for output, micro_batch in reports:
            output.raise_if_bad([sample.sample_id for sample in micro_batch.batch.samples])

    @staticmethod
    def metrics(reports: Sequence[tuple[LossOutput, MicroBatch]]) -> MetricSums:
        """The sum of what the micro-batches measured on this rank."""
        return sum((output.metrics for output, _ in reports), start=MetricSums())
