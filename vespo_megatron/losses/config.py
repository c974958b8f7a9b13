"""Configuration of the policy loss, checked: a combination that means nothing is refused with the reason."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from vespo_megatron.errors import UserError
from vespo_megatron.losses.aggregation import check_aggregation
from vespo_megatron.losses.behavior import BEHAVIORS
from vespo_megatron.losses.correction import CorrectionConfig
from vespo_megatron.losses.entropy import entropy_search
from vespo_megatron.losses.hyperparameters import check_hyperparameters
from vespo_megatron.losses.lazy import lazy
from vespo_megatron.losses.registry import Objective, Phi, get_objective, unknown
from vespo_megatron.losses.router_shift import RouterShift
from vespo_megatron.losses.search import Search, to_find

KL_TYPES = ("k1", "k2", "k3")
KL_WEIGHTS = ("none", "score", "anchor", "behavior")
METRIC_LEVELS = ("full", "none")
BAD_SAMPLE = ("error", "drop")


@dataclass(frozen=True)
class PolicyLossConfig:
    """An objective, its hyperparameters, and the parts of the loss around it; checked when made.

    Raises:
        UserError: an unknown name (the nearest is given), or a combination that means nothing (the reason is given).
    """

    name: str | Phi = "vespo"
    """A registered name, `package.module:function`, or the function itself."""
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    aggregation: str = "token-mean"
    aggregation_length: float | None = None
    """The constant of token-sum-norm; a `Normalizer` that has one takes precedence."""
    behavior: str = "rollout"
    """rollout: ratio π_θ/μ, and a correction is of it. recompute, version: ratio π_θ/π_old, `LossInputs.old_log_probs`
    given, and a correction is of π_old/μ."""
    correction: CorrectionConfig | None = None
    kl_coefficient: float = 0.0
    kl_type: str = "k3"
    kl_weight: str = "none"
    """What weighs the estimate, with its gradient: nothing (verl, TRL); e^(log π_θ − sg(log π_θ)), which is one
    (score: NeMo-RL's default); π_θ/π_anchor (anchor: TRL's use_bias_correction_kl, DeepSeek-V3.2) or π_θ/μ (behavior:
    NeMo-RL's use_on_policy_kl_approximation)."""
    kl_input_clamp: float | None = 20.0
    """Bound of |log π_ref − log π_θ| in the estimate (verl, NeMo-RL); None: none."""
    kl_output_clamp: float | None = 10.0
    """Bound of the estimate (verl for k3, NeMo-RL for all); None: none."""
    entropy_coefficient: float = 0.0
    on_bad_sample: str = "error"
    """Either way a sequence with a number that is not finite gets coefficient 0 and is counted in
    `loss/bad_samples`; `LossOutput.raise_if_bad` raises under error."""
    metrics: str = "full"
    router_shift: RouterShift | None = None
    """RSPO's weight γ̃ of each token; `LossInputs.router_shift` given. None: no weight."""

    def __post_init__(self) -> None:
        objective = self.objective
        check_hyperparameters(objective, self.hyperparameters)
        check_aggregation(self.aggregation)
        for value, known, key in (
            (self.behavior, BEHAVIORS, "behavior"),
            (self.kl_type, KL_TYPES, "reference_policy_kl_type"),
            (self.kl_weight, KL_WEIGHTS, "reference_policy_kl_weight"),
            (self.on_bad_sample, BAD_SAMPLE, "on_bad_sample"),
            (self.metrics, METRIC_LEVELS, "metrics"),
        ):
            if value not in known:
                raise unknown(key, value, known, where=f"loss_fn.{key}")
        if objective.anchor == "old" and self.behavior == "rollout":
            raise UserError(
                f"{objective.name} compares π_θ with π_old and π_old with μ; with behavior: rollout there is no "
                "π_old and it would be plain clipping",
                where="loss_fn.behavior",
                expected="recompute",
                fix="set loss_fn.behavior=recompute (version in an asynchronous run), or loss_fn.name=grpo",
            )
        if self.hyperparameters.get("opsm_anchor") == "old" and self.behavior == "rollout":
            raise UserError(
                "there is no π_old with behavior: rollout",
                where="loss_fn.hyperparameters.opsm_anchor",
                expected="behavior",
            )
        for clamp, key in (
            (self.kl_input_clamp, "kl_input_clamp_value"),
            (self.kl_output_clamp, "kl_output_clamp_value"),
        ):
            if clamp is not None and not clamp > 0:
                raise UserError(f"is {clamp}", where=f"loss_fn.{key}", expected="a number above 0, or null")
        for coefficient, key in (
            (self.kl_coefficient, "reference_policy_kl_penalty"),
            (self.entropy_coefficient, "entropy_coefficient"),
        ):
            if not 0 <= coefficient < math.inf:
                raise UserError(f"is {coefficient}", where=f"loss_fn.{key}", expected="a finite number of at least 0")
        if self.correction is not None and self.correction.weighs:
            self._check_weight(self.correction, objective)
        if self.shifts_ratio and not objective.uses_ratio:
            raise UserError(
                f"φ of {objective.name} has no ratio in it that γ̃ could multiply",
                where="loss_fn.router_shift.apply",
                expected="after_clip",
            )

    def _check_weight(self, correction: CorrectionConfig, objective: Objective) -> None:
        """Rejections go with everything; a weight has to be of a ratio that φ has not in it."""
        where = "loss_fn.correction.weight"
        if objective.corrections:
            raise UserError(f"{objective.name}: {objective.corrections}", where=where, expected="none; reject works")
        if self.behavior == "rollout" and objective.uses_ratio:
            raise UserError(
                f"φ of {objective.name} has the ratio π_θ/μ in it; a weight of the same ratio would count it twice",
                where=where,
                expected="none with behavior: rollout; reject works",
                fix="set loss_fn.behavior to recompute or version, or loss_fn.name=reinforce",
            )
        if objective.correction_apply == "before_clip" and correction.apply == "after_clip":
            raise UserError(
                f"in {objective.name} a correction enters W once, before φ; after φ it would act a second time",
                where="loss_fn.correction.apply",
                expected="before_clip, or nothing",
            )

    @lazy
    def objective(self) -> Objective:
        """The objective's row of the registry."""
        return get_objective(self.name)

    @property
    def searches(self) -> list[Search]:
        """What has to be found over a whole mini-batch first, and is not given."""
        of_objective = self.objective.search
        wanted = (
            None if of_objective is None else to_find(of_objective, self.hyperparameters),
            entropy_search(self.hyperparameters),
        )
        return [search for search in wanted if search is not None]

    @property
    def needs_entropy(self) -> bool:
        """Whether the policy's entropy at each token is part of the loss."""
        return self.entropy_coefficient != 0 or self.masks_by_entropy

    @property
    def masks_by_entropy(self) -> bool:
        """Whether tokens of low entropy have no gradient."""
        return "top_entropy_fraction" in self.hyperparameters

    @property
    def shifts_ratio(self) -> bool:
        """Whether the router shift's weights multiply the ratio, so that φ sees both."""
        return self.router_shift is not None and self.router_shift.apply == "before_clip"

    @property
    def correction_before_clip(self) -> bool:
        """Whether the correction's weights multiply the ratio, so that φ sees both; else they multiply φ."""
        if self.correction is None or not self.correction.weighs:
            return False
        return (self.correction.apply or self.objective.correction_apply) == "before_clip"

    @classmethod
    def from_recipe(cls, loss_fn: Any, behavior: str) -> PolicyLossConfig:
        """From the recipe's `loss_fn` (any object with its keys as attributes) and what its `behavior` means there."""
        shift = loss_fn.router_shift
        return cls(
            name=loss_fn.name,
            hyperparameters=dict(loss_fn.hyperparameters),
            aggregation=loss_fn.aggregation,
            aggregation_length=loss_fn.aggregation_length,
            behavior=behavior,
            correction=CorrectionConfig.from_mapping(dict(loss_fn.correction)),
            router_shift=RouterShift(shift.apply, shift.floor) if shift.apply != "none" else None,
            kl_coefficient=loss_fn.reference_policy_kl_penalty,
            kl_type=loss_fn.reference_policy_kl_type,
            kl_weight=loss_fn.reference_policy_kl_weight,
            kl_input_clamp=loss_fn.kl_input_clamp_value,
            kl_output_clamp=loss_fn.kl_output_clamp_value,
            entropy_coefficient=loss_fn.entropy_coefficient,
            on_bad_sample=loss_fn.on_bad_sample,
        )
