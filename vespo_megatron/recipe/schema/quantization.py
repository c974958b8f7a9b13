"""Keys of the precision that weights are trained and rolled out in: `policy.quantization`."""

from __future__ import annotations

from typing import Literal

from vespo_megatron.recipe.schema.base import Section, key
from vespo_megatron.recipe.schema.mismatch import LINEAR_LAYERS, Pattern, WeightFormat, rounding_phrase


class QuantizationConfig(Section):
    """`policy.quantization`: the precision flow, one quantiser for rollouts alone or for training as well."""

    scheme: WeightFormat = key("none", "Format that weights are rounded to wherever `where` says.", ours=True)
    group_size: int | None = key(
        None, "Inputs of an intN weight that share a scale; null: a whole row.", ge=1, ours=True
    )
    weights_pattern: Pattern = key(
        LINEAR_LAYERS,
        "Which weights, by Hugging Face name; the default leaves norms, embeddings, lm_head and routers alone.",
        expected="a regular expression",
        ours=True,
    )
    where: Literal["rollout", "both"] = key(
        "both",
        "rollout: on their way to the engine only; both: in every pass of the trainer too, with straight-through "
        "gradients (Jet-RL's unified flow, arXiv 2601.14243).",
        ours=True,
    )

    @property
    def in_training(self) -> bool:
        """Whether the trainer computes with rounded weights."""
        return self.scheme != "none" and self.where == "both"

    @property
    def phrase(self) -> str:
        """What is on, as in `int4 (groups of 32) in training and rollouts`; empty where nothing is."""
        if self.scheme == "none":
            return ""
        rounding = rounding_phrase(self.scheme, self.group_size, self.weights_pattern)
        return f"{rounding} in {'training and ' if self.in_training else ''}rollouts"
