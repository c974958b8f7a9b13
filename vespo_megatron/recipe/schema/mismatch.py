"""Keys of mismatch that is made on purpose: `policy.generation.mismatch`."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from vespo_megatron.recipe.schema.base import Section, key

LINEAR_LAYERS = r"(_proj|\.w[123])\.weight$"
"""Attention's projections, experts and dense MLPs of every family; norms, embeddings, `lm_head` and routers do not fit.

DeepSeek-V3's FP8 keeps the same in their precision (arXiv 2412.19437, section 3.3.1)."""


def _regular_expression(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"is {pattern!r}: {error}") from None
    return pattern


Pattern = Annotated[str, Field(json_schema_extra={"format": "regex"}), AfterValidator(_regular_expression)]
WeightFormat = Literal["none", "bfloat16", "float16", "fp8_e4m3", "int8", "int6", "int4", "int3", "int2"]
Layer = Annotated[int, Field(ge=0)]


def rounding_phrase(scheme: str, group_size: int | None, pattern: str) -> str:
    """How weights are rounded, as in `int4 (groups of 32)`."""
    group = f" (groups of {group_size})" if group_size else ""
    return f"{scheme}{group}" + ("" if pattern == LINEAR_LAYERS else f" of {pattern}")


class MismatchConfig(Section):
    """`policy.generation.mismatch`: instruments, which make the rollout engine differ from the trainer on purpose."""

    weights: WeightFormat = key(
        "none", "Format that weights are rounded to on their way to the engine; their dtype stays.", ours=True
    )
    group_size: int | None = key(
        None, "Inputs of an intN weight that share a scale; null: a whole row.", ge=1, ours=True
    )
    weights_pattern: Pattern = key(
        LINEAR_LAYERS,
        "Which weights, by Hugging Face name; the default leaves norms, embeddings, lm_head and routers alone.",
        expected="a regular expression",
        ours=True,
    )
    kv_cache: Literal["none", "bfloat16", "fp8_e4m3"] = key(
        "none", "Format that keys and values are rounded to (backend in_process).", ours=True
    )
    activations: Literal["none", "bfloat16", "float16", "fp8_e4m3"] = key(
        "none", "Format that inputs of linear layers are rounded to (backend in_process).", ours=True
    )
    route_flip: float = key(
        0.0,
        "Probability, per token and MoE layer, that the last chosen expert is the next-best one instead "
        "(backend in_process).",
        ge=0,
        le=1,
        ours=True,
    )
    route_flip_layers: list[Layer] | None = key(
        None, "MoE layers that it concerns, numbered as in `model.layers.N`; null: all.", ours=True
    )
    log_prob_noise: float = key(
        0.0, "Standard deviation of the noise on each returned log-prob (backend in_process).", ge=0, ours=True
    )

    @property
    def phrase(self) -> str:
        """What is on, as in `weights int4 (groups of 32), route_flip 0.1`; empty where nothing is."""
        parts = []
        if self.weights != "none":
            parts.append(f"weights {rounding_phrase(self.weights, self.group_size, self.weights_pattern)}")
        if self.kv_cache != "none":
            parts.append(f"kv_cache {self.kv_cache}")
        if self.activations != "none":
            parts.append(f"activations {self.activations}")
        if self.route_flip:
            layers = self.route_flip_layers
            where = "" if layers is None else f" (layers {', '.join(map(str, layers))})"
            parts.append(f"route_flip {self.route_flip:g}{where}")
        if self.log_prob_noise:
            parts.append(f"log_prob_noise {self.log_prob_noise:g}")
        return ", ".join(parts)

    @property
    def in_engine(self) -> dict[str, str | float]:
        """Key → value of what is on and happens inside the engine, where only the in-process one can do it."""
        found = {name: getattr(self, name) for name in ("kv_cache", "activations", "route_flip", "log_prob_noise")}
        return {name: value for name, value in found.items() if value not in ("none", 0.0)}
