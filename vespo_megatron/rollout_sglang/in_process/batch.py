"""One batch of the in-process engine: each prompt prefilled once, then a token of every row per step until all end."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from vespo_megatron.data.sample import smallest_int_dtype
from vespo_megatron.data.sampling_mask import SamplingMask
from vespo_megatron.rollout_sglang.engine import GenerationRequest, GenerationResult
from vespo_megatron.rollout_sglang.in_process.mismatch import noise_salts
from vespo_megatron.rollout_sglang.in_process.model import CachedDecoder
from vespo_megatron.rollout_sglang.in_process.prefix_random import PrefixRandom
from vespo_megatron.rollout_sglang.in_process.sampling import RowSampler

_COMPACT_BELOW = 0.75
"""Finished rows are dropped from the batch once fewer than this share of its rows is unfinished."""


class Batch:
    """Requests generated side by side, one token of each per step; every unfinished row is at the same step.

    Args:
        model: holds the weights; they change while `between_steps` runs, and at no other time.
        limits: tokens to draw at most, per request.
        weight_version: of the model's weights, now: each token is stamped with those that drew it.
        return_routes: keep the experts of every token.
        emit: called with each result as its row finishes.
    """

    def __init__(
        self,
        model: CachedDecoder,
        requests: list[GenerationRequest],
        limits: list[int],
        *,
        weight_version: Callable[[], int],
        return_routes: bool,
        emit: Callable[[GenerationResult], None],
    ) -> None:
        self.model, self.requests, self.limits, self.emit = model, requests, limits, emit
        self.weight_version, self.return_routes = weight_version, return_routes
        self.device = model.device
        self.results: list[GenerationResult | None] = [None] * len(requests)
        # Column s of these holds step s: the token sampled, its log-prob, and the experts it met when it was run.
        self.tokens = np.zeros((len(requests), 0), dtype=np.int64)
        self.log_probs = np.zeros((len(requests), 0), dtype=np.float32)
        self.versions: list[int] = []
        """Of each step: the weights that drew its token and ran the token before it; every row's alike."""
        self.sampling_mask: list[list[np.ndarray]] = [[] for _ in requests]
        shape = model.shape
        self._route_dtype = smallest_int_dtype(shape.num_experts)
        sizes = (len(requests), 0, shape.num_moe_layers, shape.num_experts_per_tok)
        self.routes = np.zeros(sizes, self._route_dtype)

    def run(self, between_steps: Callable[[], bool]) -> list[GenerationResult]:
        """Generate until every row is finished, or until `between_steps()` is False: the rest is then an abort.

        It is called before each decode step, and may change the model's weights: the cache stays as it is.
        """
        prompts = {request.prompt_ids: None for request in self.requests}
        unique = {prompt: index for index, prompt in enumerate(prompts)}
        lengths = torch.tensor([len(prompt) for prompt in unique], device=self.device)
        width = int(lengths.max())
        ids = torch.zeros(len(unique), width, dtype=torch.int64, device=self.device)
        for prompt, index in unique.items():
            ids[index, : len(prompt)] = torch.tensor(prompt, device=self.device)
        # Requests of one group share a prompt: it is run once, and its cache rows are repeated.
        cache = self.model.new_cache(len(unique), width + min(max(self.limits), 64))
        flips, random = self._read_prompts(ids, lengths)
        self.versions.append(self.weight_version())
        logits, prompt_routes = self.model.prefill(ids, lengths, cache, flips)
        self.prompt_routes = self._pack_routes(prompt_routes)
        self.prompt_index = [unique[request.prompt_ids] for request in self.requests]
        rows = torch.tensor(self.prompt_index, device=self.device)
        cache.select(rows)
        logits, positions = logits[rows], lengths[rows]
        random = random and random.select(rows.cpu().numpy())
        salts = noise_salts(self.requests)

        sampler = RowSampler(self.requests, self.limits, self.device)
        stops = self._stop_tokens()
        limits = torch.tensor(self.limits, device=self.device)
        origin = torch.arange(len(self.requests), device=self.device)
        alive = torch.ones(len(self.requests), dtype=torch.bool, device=self.device)
        longest, step = width, 0
        while True:
            tokens, log_probs, sampling_mask = sampler.sample(logits, step)
            flips = None
            if random is not None:
                random.read(tokens.cpu().numpy())
                flips = self.model.mismatch.flips(random.states, self.model.shape.moe_layers)
                log_probs = self._noisy(log_probs, random, salts)
            self._write(step, origin.cpu().numpy(), tokens.cpu().numpy(), log_probs.cpu().numpy(), sampling_mask)
            stop = stops[torch.arange(len(tokens), device=self.device) if len(stops) > 1 else 0, tokens]
            ended = alive & (stop | (limits == step + 1))
            if bool(ended.any()):
                for row, by_stop in zip(origin[ended].tolist(), stop[ended].tolist(), strict=True):
                    self._finish(row, step + 1, "stop" if by_stop else "length")
                alive = alive & ~ended
                num_alive = int(alive.sum())
                if num_alive == 0:
                    break
                if num_alive < _COMPACT_BELOW * len(alive):
                    keep = alive.nonzero()[:, 0]
                    cache.select(keep)
                    sampler.select(keep)
                    kept = keep.cpu().numpy()
                    flips, salts = None if flips is None else flips[kept], salts[kept]
                    random = random and random.select(kept)
                    tokens, positions, limits, origin, alive = (
                        part[keep] for part in (tokens, positions, limits, origin, alive)
                    )
                    stops = stops[keep] if len(stops) > 1 else stops
                    longest = int(positions.max())
            if not between_steps():
                for row in origin[alive].tolist():
                    self._finish(row, step + 1, "abort")
                break
            longest += 1
            self.versions.append(self.weight_version())
            logits, routes = self.model.decode(tokens, positions, longest, cache, flips)
            self.routes[origin.cpu().numpy(), step] = self._pack_routes(routes)
            positions, step = positions + alive, step + 1  # what has ended may stand at the end of the context
        return [result for result in self.results if result is not None]

    def _read_prompts(
        self, ids: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor | None, PrefixRandom | None]:
        """Where prompts' tokens flip, bool [prompts, P, moe_layers], and their random numbers after the last token."""
        mismatch = self.model.mismatch
        if not mismatch.is_random:
            return None, None
        reader = PrefixRandom.new(len(ids), mismatch.seed, self.weight_version())
        states = reader.read_all(ids.cpu().numpy())
        last = states[np.arange(len(ids)), lengths.cpu().numpy() - 1]
        return mismatch.flips(states, self.model.shape.moe_layers), PrefixRandom(last)

    def _noisy(self, log_probs: torch.Tensor, random: PrefixRandom, salts: np.ndarray) -> torch.Tensor:
        """float32 [rows]: with the noise of the tokens just read, and no more than 0."""
        scale = self.model.mismatch.log_prob_noise
        if not scale:
            return log_probs
        noise = torch.from_numpy(scale * random.normals(salts)).to(log_probs)
        return (log_probs + noise).clamp_(max=0.0)

    def _stop_tokens(self) -> torch.Tensor:
        """bool [rows or 1, vocabulary]: the tokens that end a row; one row when all requests agree."""
        wanted = [request.sampling.stop_token_ids for request in self.requests]
        wanted = wanted[:1] if len(set(wanted)) == 1 else wanted
        table = torch.zeros(len(wanted), self.model.shape.vocab_size, dtype=torch.bool, device=self.device)
        for row, stop_token_ids in enumerate(wanted):
            table[row, [token for token in stop_token_ids if token < table.shape[1]]] = True
        return table

    def _pack_routes(self, routes: torch.Tensor) -> np.ndarray:
        return routes.cpu().numpy().astype(self._route_dtype)

    def _write(
        self, step: int, rows: np.ndarray, tokens: np.ndarray, log_probs: np.ndarray, sampling_mask: SamplingMask | None
    ) -> None:
        if step == self.tokens.shape[1]:
            more = min(max(64, step), max(self.limits) - step)
            self.tokens = np.pad(self.tokens, ((0, 0), (0, more)))
            self.log_probs = np.pad(self.log_probs, ((0, 0), (0, more)))
            self.routes = np.pad(self.routes, ((0, 0), (0, more), (0, 0), (0, 0)))
        self.tokens[rows, step] = tokens
        self.log_probs[rows, step] = log_probs
        if sampling_mask is not None:
            for row, ids in zip(rows, sampling_mask.lists(), strict=True):
                self.sampling_mask[row].append(ids)

    def _finish(self, row: int, length: int, reason: str) -> None:
        request, versions = self.requests[row], np.array(self.versions[:length], dtype=np.int64)
        routes, route_versions = None, None
        if self.return_routes:
            prompt_length, start = len(request.prompt_ids), request.routes_start
            prompt = self.prompt_routes[self.prompt_index[row], :prompt_length]
            routes = np.concatenate([prompt, self.routes[row, : length - 1]])[start:]
            route_versions = np.concatenate([np.full(prompt_length - 1, versions[0]), versions])[start:]
        result = GenerationResult(
            request_id=request.request_id,
            output_ids=self.tokens[row, :length].copy(),
            behavior_log_probs=self.log_probs[row, :length].copy(),
            weight_versions=versions,
            finish_reason=reason,
            routes=routes,
            route_versions=route_versions,
            sampling_mask=SamplingMask.of(self.sampling_mask[row][:length]) if request.wants_sampling_mask else None,
        )
        self.results[row] = result
        self.emit(result)
