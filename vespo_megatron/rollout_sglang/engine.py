"""The rollout engine protocol: what the trainer needs of whatever generates its samples.

Two implementations: `sglang_engine.SGLangEngine` (HTTP to real servers, the default) and
`in_process.InProcessEngine` (the same process, for fast tests and sweeps). One conformance test holds both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from vespo_megatron.data.sampling_mask import SamplingMask

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. `top_p=1, top_k=-1, min_p=0` is the full distribution; anything else truncates it."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    """Leave out tokens less likely than this share of the most likely one."""
    stop_token_ids: tuple[int, ...] = ()

    @property
    def truncates(self) -> bool:
        """Whether some tokens cannot be drawn though the model gives them probability (greedy is not meant)."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k != -1 or self.min_p > 0)


@dataclass(frozen=True)
class GenerationRequest:
    """One response wanted for one prompt."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    group_id: str = ""
    """Requests of one group share a prompt; an engine may keep them together for its prefix cache."""
    seed: int | None = None
    """In-process engine: makes the response a function of (weights, prompt, seed)."""
    deadline_s: float | None = None
    """SGLang: seconds from dispatch after which it ends as 'abort' with the tokens it has."""
    evaluation: bool = False
    """Nothing trains on it: where sampling truncates, any engine may report the full distribution's log-probs."""
    routes_start: int = 0
    """Of the prompt's tokens, so many have routes already, of an earlier turn: they are not returned again."""

    @property
    def wants_sampling_mask(self) -> bool:
        """Whether its log-probs are to be those of the truncated distribution, and what that consists of told."""
        return self.sampling.truncates and not self.evaluation


@dataclass
class GenerationResult:
    """What came back. Shapes as in `data.sample.Sample`."""

    request_id: str
    output_ids: np.ndarray
    """int64 [R], stop token included."""
    behavior_log_probs: np.ndarray
    """float32 [R], log μ of the distribution each token was drawn from: temperature-scaled, and renormalised over what
    top-k, top-p and min-p leave (see `GenerationRequest.evaluation`). At temperature 0, of that of temperature 1."""
    weight_versions: np.ndarray
    """int64 [R]"""
    finish_reason: str
    """'stop', 'length' or 'abort'."""
    routes: np.ndarray | None = None
    """Smallest unsigned int [P + R - 1 - routes_start, layers, topk], or None."""
    route_versions: np.ndarray | None = None
    """int64, of each row of `routes`: the weights of the forward that computed it, or `data.sample.UNKNOWN_VERSION`.
    The prompt's rows are of the weights that drew the first token, or of those before in a cache that has outlived them
    (`update_weights` in place)."""
    sampling_mask: SamplingMask | None = None
    """What each token was drawn from, where sampling truncates and something trains on it; else None."""
    extra: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoredResponse:
    """A response that was drawn before, as the engine finds it in one pass over prompt and response (prefill)."""

    log_probs: np.ndarray | None
    """float32 [R], of the full vocabulary at the temperature asked for; None where the engine does not tell, NaN for a
    token that it does not score."""
    hidden: np.ndarray | None = None
    """float32 [layers, R, hidden size], each layer's output where the response's tokens are predicted; None where the
    engine does not tell."""


class RolloutEngine(Protocol):
    """Lives on global rank 0. Generation is asynchronous; weight updates block the caller."""

    description: str
    """For people: name, version, device; for instance 'SGLang 0.5.23 at 127.0.0.1:31000 (cpu)'."""
    weight_version: int
    """Of the weights that it holds."""
    context_length: int
    """Prompt and response tokens at most."""

    async def generate(
        self,
        requests: Sequence[GenerationRequest],
        *,
        on_result: Callable[[GenerationResult], None] | None = None,
    ) -> list[GenerationResult]:
        """Results in the order of `requests`; `on_result` is called as each one arrives (progress bars, rewards).

        Raises `UserError` for a token id outside the vocabulary or a prompt beyond the context, before sending;
        `faults.WeightsNeeded` when it cannot go on without a weight update (what arrived was given to `on_result`).
        """

    async def score(
        self, responses: Sequence[tuple[np.ndarray, np.ndarray]], temperature: float
    ) -> list[ScoredResponse]:
        """What the weights it has now make of (prompt ids, response ids): one pass each, not token by token."""

    def update_weights(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int, *, in_place: bool = False
    ) -> str:
        """Take a complete set of HF-named tensors, one at a time (the stream is consumed once, never collected).

        Args:
            in_place: requests that run are not waited for: they stand still meanwhile, and go on with the new weights
                and the cache of the old ones.

        Returns the checksum both sides agree on; raises `UserError` when they do not, and `faults.WeightsNeeded` when a
        server failed and the same update can be made without it.
        """

    def release_memory(self) -> int:
        """Give all device memory to the trainer: weights and cache are lost. Returns how many servers are up to get it.

        `update_weights` takes back room for weights alone; `generate` needs `resume_memory` after it.
        """

    def resume_memory(self) -> None:
        """Take back, after an update, all else that generation needs."""

    def await_server(self) -> None:
        """After `release_memory` found none up: let servers start, until one is up and has given its memory back."""

    async def pause(self) -> None:
        """End running requests as 'abort' and hold new ones back; returns when all have ended."""

    async def resume(self) -> None:
        """Let requests run again."""

    async def health(self) -> bool:
        """Whether it can generate now: open, and with whole weights."""

    def metrics(self) -> dict[str, float]:
        """What happened since the last call, by metric name (`rollout/…`)."""

    def close(self) -> None:
        """Release connections and process groups; idempotent."""
