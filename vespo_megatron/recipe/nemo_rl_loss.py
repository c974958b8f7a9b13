"""NeMo-RL's one loss with its switches (nemo_rl/algorithms/loss/loss_functions.py, ClippedPGLossFn) as ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

DEFAULTS: dict[str, Any] = {
    "ratio_clip_min": 0.2,
    "ratio_clip_max": 0.2,
    "ratio_clip_c": None,
    "sequence_level_importance_ratios": False,
    "token_level_loss": True,
    "use_importance_sampling_correction": False,
    "truncated_importance_sampling_type": None,
    "truncated_importance_sampling_ratio": None,
    "truncated_importance_sampling_ratio_min": None,
    "force_on_policy_ratio": False,
    "disable_ppo_ratio": False,
    "use_cispo": False,
}
"""The keys that are the objective together, with the values that theirs have where a file says nothing."""

KEYS = {f"loss_fn.{name}" for name in DEFAULTS}


def objective(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Our `loss_fn.*` for their dotted keys.

    Their ratio is π_θ/π_prev, π_prev by the trainer; the correction weighs what was clipped by π_prev/π_gen.
    """
    given = {name: theirs.get(f"loss_fn.{name}", default) for name, default in DEFAULTS.items()}
    name, hyperparameters = _phi(given)
    ours: dict[str, Any] = {
        "loss_fn.name": name,
        "loss_fn.hyperparameters": hyperparameters,
        "loss_fn.aggregation": "token-mean" if given["token_level_loss"] else "seq-mean-token-mean",
        "loss_fn.behavior": "recompute",
    }
    if given["use_importance_sampling_correction"]:
        ours["loss_fn.correction"] = _correction(given)
    return ours


def _phi(given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    low = min(given["ratio_clip_min"], 1.0)  # above 1 it is a bound below 0, which a ratio never reaches
    high, dual = given["ratio_clip_max"], given["ratio_clip_c"]
    if given["force_on_policy_ratio"] or given["disable_ppo_ratio"]:  # the gradient of log π, ratio one or none
        return "reinforce", {}
    if given["use_cispo"]:
        return "cispo", {"ratio_min": 1 - low, "ratio_max": 1 + high}
    if given["sequence_level_importance_ratios"]:
        bound = None if dual is None else math.log(dual)
        return "gspo", {"clip_low": low, "clip_high": high, "log_ratio_max": bound}
    return "grpo", {"clip_low": low, "clip_high": high, "dual_clip": dual}


def _correction(given: Mapping[str, Any]) -> dict[str, Any]:
    """One weight per token, or one product per response with `sequence_level_importance_ratios`."""
    level = "sequence" if given["sequence_level_importance_ratios"] else "token"
    kind, high = given["truncated_importance_sampling_type"], given["truncated_importance_sampling_ratio"]
    low = given["truncated_importance_sampling_ratio_min"]
    if high is None:
        return {"weight": "tis", "level": level, "high": math.inf}
    if kind == "icepop":
        return {"weight": "mis", "level": level, "low": low, "high": high}
    if kind == "seq-mask-tis":
        rule = {"statistic": "k1", "level": "mean", "low": low, "high": high}
        return {"weight": "tis", "level": level, "high": math.inf, "reject": [rule]}
    return {"weight": "tis", "level": level, "low": low or 0.0, "high": high}
