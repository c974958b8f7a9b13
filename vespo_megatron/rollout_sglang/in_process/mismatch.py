"""What makes the in-process engine differ from the trainer on purpose: `policy.generation.mismatch` without weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vespo_megatron.families.shape import ModelShape
from vespo_megatron.quantization import fake_quantize_cache, fake_quantize_tokens
from vespo_megatron.recipe.schema import MismatchConfig
from vespo_megatron.rollout_sglang.engine import GenerationRequest
from vespo_megatron.rollout_sglang.in_process.prefix_random import PrefixRandom, uniforms


@dataclass(frozen=True)
class EngineMismatch:
    """Each field as the recipe key of its name; the default is an engine as it is.

    Args:
        seed: of flips and noise.
    """

    kv_cache: str = "none"
    activations: str = "none"
    route_flip: float = 0.0
    route_flip_layers: tuple[int, ...] | None = None
    log_prob_noise: float = 0.0
    seed: int = 0

    @classmethod
    def of(cls, config: MismatchConfig, seed: int) -> EngineMismatch:
        """As a recipe says."""
        layers = None if config.route_flip_layers is None else tuple(config.route_flip_layers)
        return cls(config.kv_cache, config.activations, config.route_flip, layers, config.log_prob_noise, seed)

    @property
    def is_random(self) -> bool:
        """Whether it needs random numbers."""
        return self.route_flip > 0 or self.log_prob_noise > 0

    def cached(self, states: torch.Tensor) -> torch.Tensor:
        """Keys or values as the cache gives them back."""
        return states if self.kv_cache == "none" else fake_quantize_cache(states, self.kv_cache)

    def linear_input(self, hidden: torch.Tensor) -> torch.Tensor:
        """What a linear layer reads of `hidden` [tokens, channels]: attention's projections, experts and dense MLPs."""
        return hidden if self.activations == "none" else fake_quantize_tokens(hidden, self.activations)

    def flips(self, states: np.ndarray, layers: Sequence[int]) -> torch.Tensor | None:
        """bool [..., MoE layers]: where tokens of these states (`PrefixRandom`) take the next-best expert.

        Args:
            layers: the numbers of the model's MoE layers.
        """
        if not self.route_flip:
            return None
        flipped = uniforms(states, len(layers)) < self.route_flip
        if self.route_flip_layers is not None:
            flipped &= np.isin(layers, self.route_flip_layers)
        return torch.from_numpy(flipped)

    def flips_along(self, ids: np.ndarray, version: int, layers: Sequence[int]) -> torch.Tensor | None:
        """bool [rows, T, MoE layers]: `flips` of every token of sequences, int [rows, T], under weights `version`."""
        if not self.route_flip:
            return None
        return self.flips(PrefixRandom.new(len(ids), self.seed, version).read_all(ids), layers)


AS_IT_IS = EngineMismatch()
"""No mismatch."""


def noise_salts(requests: Sequence[GenerationRequest]) -> np.ndarray:
    """uint64 [requests]: what tells the noise of one response from another's; fresh where a request has no seed."""
    fresh = np.random.default_rng()
    seeds = [request.seed for request in requests]
    drawn = [int(fresh.integers(1 << 63)) if seed is None else seed % (1 << 64) for seed in seeds]
    return np.array(drawn, dtype=np.uint64)


def choose_experts(
    router: Any, hidden: torch.Tensor, shape: ModelShape, flip: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates and experts [T, k] of a layer's router, which is transformers'.

    Args:
        flip: bool [T]: whose last expert is the next-best one instead; the gates are then those of the new k.
    """
    logits, gates, experts = router(hidden)
    if flip is None:
        return gates, experts
    scores = torch.sigmoid(logits.float()) if shape.router_scores == "sigmoid" else torch.softmax(logits.float(), -1)
    preferred = scores + router.e_score_correction_bias if shape.correction_bias else scores
    best = preferred.topk(experts.shape[1] + 1, dim=-1).indices
    other = torch.cat([best[:, :-2], best[:, -1:]], dim=1)
    other_gates = scores.gather(1, other)
    if shape.norm_topk_prob:
        other_gates /= other_gates.sum(dim=-1, keepdim=True)
    other_gates *= shape.routed_scaling_factor
    flip = flip[:, None].to(hidden.device)
    return torch.where(flip, other_gates.to(gates.dtype), gates), torch.where(flip, other, experts)
