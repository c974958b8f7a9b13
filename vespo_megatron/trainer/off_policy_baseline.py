"""VCPO's off-policy baseline on a mini-batch: advantages R − b*, b* from the gradient norm of every response.

b* = Σ w²‖∇ log π‖²R / Σ w²‖∇ log π‖² of a group is what makes the gradient's variance least (arXiv 2602.17616; code:
mit-han-lab/vcpo). The norms are exact: one forward and one backward per response of the mini-batch, the others of the
mini-batch standing by, so that an update costs what its mini-batch would at one response per micro-batch and no data
parallelism, and then the update itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from vespo_megatron.data.sample import Sample
from vespo_megatron.losses.vcpo import ResponseFacts, off_policy_advantages
from vespo_megatron.megatron.micro_batch import MicroBatch, prepare
from vespo_megatron.megatron.policy import MegatronPolicy


class OffPolicyBaseline:
    """See the module. Every method is a collective.

    Args:
        group: of all ranks, on gloo.
        normalize: divide by the group's standard deviation of rewards.
        zero_truncated: whether truncated responses have no advantage (`grpo.overlong_filtering: zero_advantage`).
    """

    def __init__(
        self, policy: MegatronPolicy, group: dist.ProcessGroup, *, normalize: bool, zero_truncated: bool
    ) -> None:
        self.policy, self.group, self.normalize, self.zero_truncated = policy, group, normalize, zero_truncated

    def apply(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Give every response of the mini-batch its advantage over b*."""
        advantages = off_policy_advantages(self.facts(micro_batches), normalize=self.normalize)
        for micro_batch in micro_batches:
            values = [advantages[sample.sample_id] for sample in micro_batch.batch.samples]
            micro_batch.advantages = torch.tensor(
                values, dtype=micro_batch.advantages.dtype, device=micro_batch.advantages.device
            )

    def facts(self, micro_batches: Sequence[MicroBatch]) -> list[ResponseFacts]:
        """Of every response of the mini-batch, on whichever rank it is."""
        rank_info = self.policy.rank_info
        alone = [one for micro_batch in micro_batches for one in self._one_by_one(micro_batch)]
        mine = (rank_info.data_rank, [self._described(one.batch.samples[0]) for one in alone])
        everyone: list[Any] = [None] * rank_info.world_size
        dist.all_gather_object(everyone, mine, group=self.group)
        described = dict(everyone)
        owners = [(rank, place) for rank in range(rank_info.data_size) for place in range(len(described[rank]))]
        shortest = min(alone, key=lambda one: one.layout.num_global_tokens)
        norms, sums = [], torch.zeros(len(owners), dtype=torch.float64)
        for number, (rank, place) in enumerate(owners):
            is_mine = rank == rank_info.data_rank
            reports = self.policy.compute_gradients(
                [alone[place] if is_mine else shortest], _log_likelihood if is_mine else _nothing
            )
            norms.append(self.policy.gradient_norm())
            if is_mine and reports and rank_info.tensor_rank == 0:
                sums[number] = float(reports[0])
        dist.all_reduce(sums, group=self.group)
        return [
            replace(described[rank][place], log_weight=log_weight, gradient_norm=norm)
            for (rank, place), log_weight, norm in zip(owners, sums.tolist(), norms, strict=True)
        ]

    def _one_by_one(self, micro_batch: MicroBatch) -> list[MicroBatch]:
        request = micro_batch.request
        return [
            prepare(
                [micro_batch.batch.select([index])],
                self.policy.rank_info,
                temperature=request.temperature,
                log_prob_bytes=request.memory_bytes,
            )[0]
            for index in range(len(micro_batch.batch))
        ]

    def _described(self, sample: Sample) -> ResponseFacts:
        is_trained = bool(sample.loss_mask.any()) and not (self.zero_truncated and sample.truncated)
        return ResponseFacts(sample.sample_id, sample.prompt_id, sample.reward, is_trained, 0.0, 0.0)


def _log_likelihood(
    log_probs: torch.Tensor, _: torch.Tensor, micro_batch: MicroBatch
) -> tuple[torch.Tensor, torch.Tensor]:
    """−log π of the response; reports this rank's share of Σ log π/μ."""
    gap = torch.where(micro_batch.mask, log_probs.detach() - micro_batch.behavior_log_probs, 0.0)
    return -torch.where(micro_batch.mask, log_probs, 0.0).sum(), gap.double().sum()


def _nothing(log_probs: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A loss of zero, for ranks whose turn it is not: experts and collectives want them all the same."""
    return 0.0 * log_probs.sum(), torch.zeros(())
