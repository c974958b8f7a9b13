"""Learning rate of one update: scaled by the effective sample size of its weights (VCPO), and by how stale they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from vespo_megatron.losses import learning_rate_scale
from vespo_megatron.megatron.parallel import data_context_parallel_group
from vespo_megatron.megatron.policy import MegatronPolicy
from vespo_megatron.recipe.schema import AsyncGRPOConfig, LossConfig
from vespo_megatron.trainer.objective import Objective


def scale_by_ess(loss_fn: LossConfig, policy: MegatronPolicy, objective: Objective, reports: Sequence[Any]) -> None:
    """Scale the coming update's learning rate by the ESS of W, as `loss_fn.ess_learning_rate` says; a collective."""
    rule, rank_info = loss_fn.ess_learning_rate, policy.rank_info
    if rule == "none":
        return
    ess = torch.zeros(1, device=rank_info.device)
    if rank_info.is_last_stage:
        metrics = objective.metrics(reports).all_reduce(data_context_parallel_group()).finalize()
        # A mini-batch of which nothing is trained on has none, and nothing to scale.
        ess += metrics.get("vespo/ess", 1.0) / rank_info.tensor_size
    # Ranks of other stages hold 0, replicas along DP, CP and TP the same value: the mean over the last stage's.
    dist.all_reduce(ess)
    share = ess.item() / (rank_info.data_size * rank_info.context_size)
    policy.scale_learning_rate(learning_rate_scale(share, rule, loss_fn.ess_base))


def staleness_scale(lag: int, free_lag: float) -> float:
    """Factor that keeps lag · learning rate at or below `free_lag` times the learning rate, in (0, 1].

    The bias of a stale surrogate's gradient grows as S·η, S the largest lag, and where that binds the learning rate has
    to stay below R/(S·G) (arXiv 2607.01083, of which the abstract was read, not the experiments).
    """
    return min(1.0, free_lag / lag) if lag > 0 else 1.0


def scale_by_staleness(asynchronous: AsyncGRPOConfig, policy: MegatronPolicy, reports: Sequence[Any]) -> None:
    """Scale the coming update's learning rate by the largest lag in it, where the recipe says so; a collective."""
    if asynchronous.learning_rate_lag is None:
        return
    lags = [0, *(int(each.batch.lags.max()) for _, each in reports if each.batch.lags is not None)]
    largest = torch.tensor(max(lags), device=policy.rank_info.device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    policy.scale_learning_rate(staleness_scale(int(largest), asynchronous.learning_rate_lag))
