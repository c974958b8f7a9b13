"""Sampling for the in-process engine: one uniform number per token, from a stream that belongs to the request."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vespo_megatron.data.sampling_mask import SamplingMask
from vespo_megatron.rollout_sglang.engine import GenerationRequest


def uniform_stream(request: GenerationRequest, count: int) -> np.ndarray:
    """float64 [count] in [0, 1): a function of the request's seed and prompt; without a seed, fresh each time."""
    import xxhash

    if request.seed is None:
        return np.random.default_rng().random(count)
    prompt = xxhash.xxh3_64_intdigest(np.asarray(request.prompt_ids, dtype=np.int64).tobytes())
    return np.random.Generator(np.random.Philox(key=[request.seed % (1 << 64), prompt])).random(count)


class RowSampler:
    """Draws a token for every row, each row with its own parameters, by inverting the cumulative distribution.

    A row's token depends on its own logits and its own uniform number alone, never on its neighbours.
    """

    def __init__(self, requests: Sequence[GenerationRequest], limits: Sequence[int], device: torch.device) -> None:
        """`limits`: response tokens of each row at most."""
        params = [request.sampling for request in requests]
        longest = max(limits)
        streams = np.ones((len(requests), longest))
        for row, (request, limit) in enumerate(zip(requests, limits, strict=True)):
            streams[row, :limit] = uniform_stream(request, limit)
        self.uniforms = torch.from_numpy(streams).to(device)
        self.temperatures = torch.tensor([p.temperature for p in params], dtype=torch.float32, device=device)[:, None]
        self.greedy = self.temperatures[:, 0] <= 0
        self.temperatures[self.greedy] = 1.0
        self.top_p = torch.tensor([p.top_p for p in params], dtype=torch.float32, device=device)[:, None]
        self.top_k = torch.tensor([p.top_k for p in params], device=device)[:, None]
        self.min_p = torch.tensor([p.min_p for p in params], dtype=torch.float32, device=device)[:, None]
        self.wants_sampling_mask = torch.tensor([request.wants_sampling_mask for request in requests], device=device)
        self._refresh()

    def _refresh(self) -> None:
        self.truncated = ((self.top_p < 1) | (self.top_k > 0) | (self.min_p > 0)) & ~self.greedy[:, None]
        self.any_truncated = bool(self.truncated.any())
        self.any_greedy = bool(self.greedy.any())

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows, in this order."""
        for name in ("uniforms", "temperatures", "greedy", "top_p", "top_k", "min_p", "wants_sampling_mask"):
            setattr(self, name, getattr(self, name)[rows])
        self._refresh()

    def sample(self, logits: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor, SamplingMask | None]:
        """Tokens int64 [rows], their log-probs float32 [rows], and what they were drawn from where a row wants it.

        Log-probs are of the distribution that is drawn from: temperature-scaled, renormalised over what is left of it
        by top-k, top-p and min-p. Temperature 0 draws the most likely token and reports its log-prob at temperature 1.
        """
        log_probs = torch.log_softmax(logits / self.temperatures, dim=-1)
        probs = log_probs.double().exp_()
        sampling_mask = None
        if self.any_truncated:
            probs = self._truncate(probs)
            truncated = torch.log(probs / probs.sum(-1, keepdim=True)).float()
            log_probs = torch.where(self.truncated, truncated, log_probs)
            kept = ((probs > 0) & self.wants_sampling_mask[:, None]).cpu().numpy()
            sampling_mask = SamplingMask(kept.sum(1, dtype=np.int32), np.nonzero(kept)[1].astype(np.int32))
        cumulative = probs.cumsum_(-1)
        targets = self.uniforms[:, step, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, targets, right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)
        if self.any_greedy:
            tokens = torch.where(self.greedy, logits.argmax(-1), tokens)
        return tokens, log_probs.gather(1, tokens[:, None])[:, 0], sampling_mask

    def _truncate(self, probs: torch.Tensor) -> torch.Tensor:
        """Zero what top-k, top-p and min-p leave out; the most likely token always stays.

        As SGLang 0.5.23 does (`filter_apply_order="joint"`): top-p counts the mass of the whole distribution, not of
        what top-k has left, and min-p is a share of the most likely token's probability.
        """
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        ranks = torch.arange(probs.shape[-1], device=probs.device)[None]
        before = ordered.cumsum(-1) - ordered
        out = (
            ((self.top_k > 0) & (ranks >= self.top_k)) | (before > self.top_p) | (ordered < self.min_p * ordered[:, :1])
        )
        return torch.zeros_like(probs).scatter_(1, order, ordered.masked_fill(out & (ranks > 0), 0.0))
