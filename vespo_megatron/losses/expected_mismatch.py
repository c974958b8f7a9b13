"""How far a recipe's engine and trainer are likely apart, and whether its loss would have a gradient left."""

from __future__ import annotations

from dataclasses import dataclass

from vespo_megatron.errors import UserError
from vespo_megatron.losses.hyperparameters import COMMON
from vespo_megatron.losses.predicted import Divergence, predict
from vespo_megatron.losses.registry import get_objective
from vespo_megatron.recipe.schema import Recipe

PUBLISHED_K3 = 1.5e-3
"""KL per token between SGLang and Megatron for Qwen3-30B-A3B (arXiv 2510.11370, as cited elsewhere: not read there)."""
PUBLISHED_K3_R3 = 7.5e-4
"""The same with the engine's routes replayed."""
ENOUGH_PHI = 0.5
"""A mean φ below this scales the gradient away."""


@dataclass(frozen=True)
class ExpectedMismatch:
    """A k3 of engine and trainer, and where it is from."""

    k3: float
    source: str


def expected_mismatch(recipe: Recipe) -> ExpectedMismatch:
    """What the recipe says (`loss_fn.expected_k3`), 0 where both sides compute in float32, else what is published."""
    given = recipe.loss_fn.expected_k3
    if given is not None:
        return ExpectedMismatch(given, "loss_fn.expected_k3")
    generation, precision = recipe.policy.generation, recipe.policy.precision
    same = generation.backend == "in_process" or generation.sglang_cfg.dtype == "auto"
    if precision == "float32" and (same or generation.sglang_cfg.dtype == "float32"):
        return ExpectedMismatch(0.0, "engine and trainer compute in float32")
    if recipe.policy.router_replay.mode == "R3":
        return ExpectedMismatch(PUBLISHED_K3_R3, "published for Qwen3-30B-A3B with R3, arXiv 2510.11370")
    return ExpectedMismatch(PUBLISHED_K3, "published for Qwen3-30B-A3B, arXiv 2510.11370")


def ratio_divergence(name: str, behavior: str, engine: Divergence, staleness: Divergence) -> Divergence:
    """Of the policies that an objective's ratio compares: π_θ/μ gathers both, π_θ/π_old has staleness alone."""
    against_engine = behavior == "rollout" or get_objective(name).anchor == "behavior"
    return engine + staleness if against_engine else staleness


def objective_hyperparameters(recipe: Recipe) -> dict[str, object]:
    """Those of the recipe's φ itself."""
    given = recipe.loss_fn.hyperparameters
    return {name: value for name, value in given.items() if name not in COMMON}


def scaled_away(recipe: Recipe) -> UserError | None:
    """A warning (it is not raised) where the engines' difference alone leaves little of the gradient, else None."""
    if recipe.behavior != "rollout":
        return None
    expected = expected_mismatch(recipe)
    length = recipe.policy.generation.max_new_tokens
    made = predict(
        recipe.loss_fn.name,
        Divergence(expected.k3),
        length,
        hyperparameters=objective_hyperparameters(recipe),
    )
    if min(made.phi_positive, made.phi_negative) >= ENOUGH_PHI:
        return None
    instead = "version" if recipe.grpo.async_grpo.enabled else "recompute"
    return UserError(
        f"is rollout: the ratio gathers the engines' difference token by token. With k3 = {expected.k3:g} per token "
        f"({expected.source}), responses of {length} tokens have a mean φ of {made.phi_positive:.2f} where A ≥ 0 and "
        f"{made.phi_negative:.2f} where A < 0",
        where="loss_fn.behavior",
        expected=f"{instead}, or shorter responses: vespo-megatron predict shows φ by length",
        fix="measure k3 with vespo-megatron mismatch, and set loss_fn.expected_k3 to it",
    )
