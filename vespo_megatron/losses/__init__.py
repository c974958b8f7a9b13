"""Policy losses: every off-policy objective of the field as one φ each, in one loss −Σ φ·A·log π.

A library of its own: needs torch alone, knows tensors and a process group. Start at `policy_loss`.
"""

from vespo_megatron.losses import objectives as objectives  # registers the objectives
from vespo_megatron.losses.advantage_estimators import resolve_estimator
from vespo_megatron.losses.advantages import AdvantageOptions, Advantages, compute_advantages
from vespo_megatron.losses.aggregation import AGGREGATIONS, Normalizer
from vespo_megatron.losses.config import PolicyLossConfig
from vespo_megatron.losses.correction import CorrectionConfig, Rejection
from vespo_megatron.losses.loss_inputs import LossInputs
from vespo_megatron.losses.loss_output import LossOutput
from vespo_megatron.losses.metrics import MetricSums
from vespo_megatron.losses.packing import Packed, pack
from vespo_megatron.losses.policy_loss import compute_policy_loss, compute_ratios, correction_counts, policy_loss
from vespo_megatron.losses.ratios import Ratios
from vespo_megatron.losses.registry import Objective, get_objective, objective, objective_names
from vespo_megatron.losses.router_shift import RouterShift, router_shift
from vespo_megatron.losses.turn_advantages import compute_turn_advantages
from vespo_megatron.losses.vcpo import learning_rate_scale

__all__ = [
    "AGGREGATIONS",
    "AdvantageOptions",
    "Advantages",
    "CorrectionConfig",
    "LossInputs",
    "LossOutput",
    "MetricSums",
    "Normalizer",
    "Objective",
    "Packed",
    "PolicyLossConfig",
    "Ratios",
    "Rejection",
    "RouterShift",
    "compute_advantages",
    "compute_policy_loss",
    "compute_ratios",
    "compute_turn_advantages",
    "correction_counts",
    "get_objective",
    "learning_rate_scale",
    "objective",
    "objective_names",
    "pack",
    "policy_loss",
    "resolve_estimator",
    "router_shift",
]
