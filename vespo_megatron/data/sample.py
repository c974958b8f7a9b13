"""`Sample`: one generated response with its provenance, validated where it is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import numpy as np

from vespo_megatron.data.sampling_mask import SamplingMask
from vespo_megatron.errors import UserError

FINISH_REASONS = ("stop", "length", "abort")
NAMES_ON_DISK = {
    "behavior_log_probs": "log_probs",
    "sampling_mask": "supports",
    "route_versions": "routes_version",
}
"""Fields of a `Sample` with another name in checkpoints and bundles, so that those of earlier versions are read."""
UNKNOWN_VERSION = -1
"""Of routes that no one can tell the weights of, and of rows that no log-prob belongs to."""


def smallest_int_dtype(num_values: int) -> np.dtype:
    """The smallest unsigned integer type that holds `0 .. num_values - 1` (uint8 for 128 experts)."""
    return np.min_scalar_type(max(num_values - 1, 0))


@dataclass
class Sample:
    """One response to one prompt, as the behaviour policy μ produced it.

    Shapes: P prompt tokens, R response tokens, L MoE layers, K experts per token.
    """

    sample_id: str
    prompt_id: str
    """Responses with the same `prompt_id` form one advantage group."""
    prompt_ids: np.ndarray
    """int64 [P]"""
    response_ids: np.ndarray
    """int64 [R], the stop token included when there is one."""
    behavior_log_probs: np.ndarray
    """float32 [R], log μ of each response token under the weights that sampled it."""
    weight_versions: np.ndarray
    """int64 [R], the weight version that sampled each token."""
    finish_reason: str
    routes: np.ndarray | None = None
    """Smallest unsigned integer [P + R - 1, L, K]: the experts the engine chose; the last token has none."""
    route_versions: np.ndarray | None = None
    """int64 [P + R - 1], the weight version under which each row of `routes` was computed, or `UNKNOWN_VERSION`; made
    of one number, it is every row's. None without routes."""
    sampling_mask: SamplingMask | None = None
    """What each response token was drawn from, where sampling truncates; log μ is then over these alone."""
    loss_mask: np.ndarray = cast(np.ndarray, None)  # until `__post_init__` has run
    """bool [R]; made of None, every response token that was drawn is trained on."""
    turns: np.ndarray | None = None
    """int64 [R], of a response in turns: the turn that each token was drawn in, -1 where an environment said it; None:
    all was drawn in one."""
    turn_rewards: np.ndarray | None = None
    """float64 [turns], the environment's; they are part of the reward."""
    turn_advantages: np.ndarray | None = None
    """float64 [turns], what tokens of each turn have beside the response's advantage; None: nothing."""
    turn_facts: dict[str, float] = field(default_factory=dict)
    """Counts of what happened between turns (`controller.turns`)."""
    reward: float = float("nan")
    reward_parts: dict[str, float] = field(default_factory=dict)
    unscored: str = ""
    """Why no score came (timeout, error, died), so that the reward is a 0 that was not earned; empty when one did."""

    def __post_init__(self) -> None:
        self.prompt_ids = np.asarray(self.prompt_ids, dtype=np.int64)
        self.response_ids = np.asarray(self.response_ids, dtype=np.int64)
        self.behavior_log_probs = np.asarray(self.behavior_log_probs, dtype=np.float32)
        self.weight_versions = np.asarray(self.weight_versions, dtype=np.int64)
        num_response = len(self.response_ids)
        if self.loss_mask is None:
            self.loss_mask = self.drawn
        self._check(len(self.prompt_ids) > 0, "has an empty prompt", "at least one prompt token")
        self._check(
            self.finish_reason in FINISH_REASONS,
            f"has finish reason {self.finish_reason!r}",
            f"one of {FINISH_REASONS}",
        )
        for name in ("behavior_log_probs", "weight_versions", "loss_mask", "sampling_mask", "turns"):
            length = num_response if getattr(self, name) is None else len(getattr(self, name))
            self._check(length == num_response, f"has {length} {name}", f"{num_response}, one per response token")
        self._check(
            bool(np.isfinite(self.behavior_log_probs).all()),
            "has a log-prob that is not finite",
            "finite behaviour log-probs",
        )
        if self.sampling_mask is not None:
            inside = bool(self.sampling_mask.contains(self.response_ids).all())
            self._check(inside, "has a token outside what it was drawn from", "every token in its own support")
        if self.routes is not None:
            rows = self.num_tokens - 1
            self._check(
                self.routes.ndim == 3 and self.routes.shape[0] == rows,
                f"has routes of shape {tuple(self.routes.shape)}",
                f"[{rows}, layers, topk]: one row per token but the last",
            )
            self._check(self.route_versions is not None, "has routes of no weight version", "one version per row")
            versions = np.asarray(self.route_versions, dtype=np.int64)
            versions = np.full(rows, versions) if versions.ndim == 0 else versions
            self._check(len(versions) == rows, f"has {len(versions)} route_versions", f"{rows}, one per row of routes")
            self.route_versions = versions

    def _check(self, ok: bool, what: str, expected: str) -> None:
        if not ok:
            raise UserError(what, where=f"sample {self.sample_id}", expected=expected)

    @property
    def drawn(self) -> np.ndarray:
        """bool [R]: the policy's own tokens."""
        return np.ones(len(self.response_ids), dtype=bool) if self.turns is None else self.turns >= 0

    def token_advantages(self, advantage: float) -> np.ndarray:
        """float32 [R]: that of the response, and of each token's turn beside it; 0 where nothing was drawn."""
        values = np.full(len(self.response_ids), advantage)
        if self.turns is not None and self.turn_advantages is not None:
            drawn = self.drawn
            values[drawn] += self.turn_advantages[self.turns[drawn]]
        return np.where(self.drawn, values, 0.0).astype(np.float32)

    @property
    def truncated(self) -> bool:
        """Whether it was cut off at its limit: no stop token ended it."""
        return self.finish_reason != "stop"

    @property
    def num_tokens(self) -> int:
        """Prompt and response tokens together."""
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def token_ids(self) -> np.ndarray:
        """int64 [P + R]"""
        return np.concatenate([self.prompt_ids, self.response_ids])
