"""Log-probs of the experts that tokens were sent to, as the routers gave them: kept of π_old, and compared with π_θ.

Rows are a rank's tokens in the order its routers see them, as in a `RouteTable`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from vespo_megatron.data.sample import smallest_int_dtype
from vespo_megatron.errors import UserError
from vespo_megatron.losses.router_shift import layer_distance


@dataclass
class RouterScores:
    """Of one micro-batch on one rank, on the host: 4 bytes and the expert's number for each of rows × layers × topk."""

    experts: np.ndarray
    """Smallest unsigned integer [rows, layers, topk]; `layers` are this rank's MoE layers, in model order."""
    log_probs: np.ndarray
    """float32 [rows, layers, topk], of the router's distribution over all experts."""

    @classmethod
    def empty(cls, rows: int, layers: int, topk: int, num_experts: int) -> RouterScores:
        """To record into."""
        shape = (rows, layers, topk)
        return cls(np.zeros(shape, dtype=smallest_int_dtype(num_experts)), np.zeros(shape, dtype=np.float32))

    def take(self, rows: np.ndarray, other: RouterScores) -> None:
        """Replace the rows of `rows` (bool [rows]) by another's."""
        self.experts[rows], self.log_probs[rows] = other.experts[rows], other.log_probs[rows]


class RouterConfig(Protocol):
    """What is needed of a router's configuration."""

    moe_router_score_function: str
    moe_router_pre_softmax: bool


class Router(Protocol):
    """What is needed of a megatron-core router."""

    @property
    def config(self) -> RouterConfig: ...

    @property
    def expert_bias(self) -> torch.Tensor | None: ...


def router_log_probs(scores: torch.Tensor, router: Router) -> torch.Tensor:
    """float32 [rows, experts], without gradient, of what a router takes its top-k of.

    That is logits, their softmax, or their sigmoids with the correction bias: then the bias is taken off and each
    sigmoid divided by their sum, as megatron-core does where it needs a distribution (moe_utils.py:784).
    """
    scores = scores.detach().float()
    if router.config.moe_router_score_function == "softmax" and not router.config.moe_router_pre_softmax:
        return scores.log_softmax(dim=-1)
    if router.expert_bias is not None:
        scores = scores - router.expert_bias
    logs = scores.clamp(min=torch.finfo(scores.dtype).tiny).log()
    return logs - logs.logsumexp(dim=-1, keepdim=True)


class ScoreRecorder:
    """Fills a `RouterScores` in one forward through one model chunk."""

    def __init__(self, scores: RouterScores) -> None:
        self.scores = scores
        self._seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def see(self, column: int, log_probs: torch.Tensor, experts: torch.Tensor) -> None:
        """A layer's [rows, experts], and the experts [rows, topk] that the tokens are sent to."""
        self._seen[column] = experts, log_probs.gather(-1, experts)

    def write_back(self) -> None:
        """One copy to the host for all layers of the chunk."""
        if self._seen:
            experts, log_probs = (torch.stack(parts, dim=1) for parts in zip(*self._seen.values(), strict=True))
            self.scores.experts[:, list(self._seen)] = experts.to(torch.int32).cpu().numpy()
            self.scores.log_probs[:, list(self._seen)] = log_probs.cpu().numpy()
            self._seen = {}


@dataclass
class ShiftMeter:
    """Adds up how far the routers of this rank's layers are from `RouterScores`, in the forwards of one micro-batch."""

    experts: torch.Tensor
    """[rows, layers, topk], on the device."""
    log_probs: torch.Tensor
    """float32 [rows, layers, topk], on the device."""
    distance: torch.Tensor
    """float32 [rows]: the sum of the layers seen so far of the mean over experts of |log r_θ − log r_old|."""
    columns: set[int] = field(default_factory=set)
    """Layers seen so far."""

    @classmethod
    def of(cls, scores: RouterScores, device: torch.device) -> ShiftMeter:
        """One copy to the device; the layers read columns of it without waiting for anything."""
        experts, log_probs = (
            torch.from_numpy(values).to(device, non_blocking=True) for values in (scores.experts, scores.log_probs)
        )
        return cls(experts, log_probs, torch.zeros(len(scores.experts), device=device))

    def see(self, column: int, log_probs: torch.Tensor, _experts: torch.Tensor) -> None:
        """A layer's [rows, experts]; where the tokens are sent to now does not matter."""
        now = log_probs.gather(-1, self.experts[:, column].long())
        self.distance += layer_distance(now, self.log_probs[:, column])
        self.columns.add(column)

    def total(self) -> torch.Tensor:
        """`distance`, of all layers of this rank.

        Raises:
            UserError: a router has not been seen.
        """
        layers = self.experts.shape[1]
        if len(self.columns) != layers:
            raise UserError(
                f"saw {len(self.columns)} of this rank's {layers} routers", where="router shift", expected="all of them"
            )
        return self.distance
