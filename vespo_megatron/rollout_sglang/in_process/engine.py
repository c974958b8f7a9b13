"""The in-process rollout engine: transformers' Qwen3-MoE in the trainer's own process, for fast tests and sweeps.

It keeps SGLang's contract (log-probs, routes, weight versions, finish reasons) and adds one thing SGLang has not: a
response is a function of the weights, the prompt and `GenerationRequest.seed`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vespo_megatron.data.sample import smallest_int_dtype
from vespo_megatron.data.sampling_mask import SamplingMask
from vespo_megatron.errors import UserError
from vespo_megatron.rollout_sglang.checksum import WeightChecksum
from vespo_megatron.rollout_sglang.engine import GenerationRequest, GenerationResult
from vespo_megatron.rollout_sglang.in_process.model import CachedQwen3Moe, weight_views
from vespo_megatron.rollout_sglang.in_process.sampling import RowSampler

_COMPACT_BELOW = 0.75
"""Finished rows are dropped from the batch once fewer than this share of its rows is unfinished."""


class InProcessEngine:
    """A `RolloutEngine` in this process.

    Args:
        model_folder: Hugging Face folder of a Qwen3-MoE.
        dtype: of weights, activations and cache; log-probs are float32 in any case.
        device: where it runs.
        max_batch_size: responses generated side by side; more requests wait their turn.
        context_length: prompt and response tokens at most; None is the model's `max_position_embeddings`.
        return_routes: keep the experts of every token.

    Raises `UserError` when the folder is not a Qwen3-MoE, or one this engine does not compute.
    """

    def __init__(
        self,
        model_folder: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        max_batch_size: int = 512,
        context_length: int | None = None,
        return_routes: bool = True,
    ) -> None:
        import transformers

        self.model = _load(Path(model_folder), dtype, torch.device(device))
        config = self.model.config
        self.context_length = min(context_length or config.max_position_embeddings, config.max_position_embeddings)
        self.vocab_size = config.vocab_size
        self.max_batch_size = max_batch_size
        self.return_routes = return_routes
        self.weight_version = 0
        self.description = f"in-process transformers {transformers.__version__} ({device}, {str(dtype)[6:]})"
        self._forward = CachedQwen3Moe(self.model, self.context_length)
        self._route_dtype = smallest_int_dtype(config.num_experts)
        self._views = weight_views(self.model)
        self._lock = threading.Lock()
        # One thread for good: a new one per call would start its own OpenMP workers each time (three times slower).
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="in-process-engine")
        self._paused = threading.Event()
        self._broken = ""
        self._closed = False

    async def generate(
        self,
        requests: Sequence[GenerationRequest],
        *,
        on_result: Callable[[GenerationResult], None] | None = None,
    ) -> list[GenerationResult]:
        """See `RolloutEngine.generate`. Runs in a worker thread; `on_result` is called in the event loop's thread.

        A response is cut at the context length with finish reason 'length'. While the engine is paused, what runs
        ends as 'abort' with what it has, and what is asked for anew waits for `resume`; during a weight update it waits
        for the update's end.
        """
        for request in requests:
            self._check(request)
        while self._paused.is_set() and not self._closed:
            await asyncio.sleep(0.002)
        loop = asyncio.get_running_loop()

        def emit(result: GenerationResult) -> None:
            if on_result is not None:
                loop.call_soon_threadsafe(on_result, result)

        results = await loop.run_in_executor(self._worker, self._generate, list(requests), emit)
        await asyncio.sleep(0)  # lets the last scheduled on_result calls run before the caller goes on
        return results

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> str:
        """Take a complete set of tensors under their names on disk, cast to the engine's dtype; waits for what runs.

        Returns the `WeightChecksum` of the weights as they now are. Raises `UserError` for an unknown, repeated,
        misshapen or missing tensor; the engine then refuses to generate until an update succeeds.
        """
        with self._lock, torch.inference_mode():
            self._broken = f"the weights of version {version} did not arrive whole"
            sent = WeightChecksum()
            missing = dict.fromkeys(self._views)
            for name, tensor in named_tensors:
                where = f"weight update to version {version}, tensor {name}"
                if name not in self._views:
                    raise UserError("unknown name", where=where, expected="a Qwen3-MoE checkpoint's name")
                if name not in missing:
                    raise UserError("sent twice", where=where, expected="each tensor once")
                view = self._views[name]
                if tensor.shape != view.shape:
                    raise UserError(f"shape {tuple(tensor.shape)}", where=where, expected=str(tuple(view.shape)))
                del missing[name]
                sent.add(name, tensor.to(view.dtype))
                view.copy_(tensor)
            if missing:
                names = ", ".join(list(missing)[:3])
                raise UserError(
                    f"{len(missing)} tensors did not come: {names}" + (", …" if len(missing) > 3 else ""),
                    where=f"weight update to version {version}",
                    expected=f"all {len(self._views)} tensors",
                )
            held = self.weight_checksum()
            if held != sent.hexdigest():
                raise UserError(
                    f"checksum {held} after the update", where=f"version {version}", expected=sent.hexdigest()
                )
            self.weight_version = version
            self._broken = ""
            return held

    def weight_checksum(self) -> str:
        """The `WeightChecksum` of the weights the engine holds."""
        checksum = WeightChecksum()
        for name, view in self._views.items():
            checksum.add(name, view)
        return checksum.hexdigest()

    def release_memory(self) -> None:
        """Nothing: the weights are all that is kept between calls, and they are this process's own."""

    async def pause(self) -> None:
        """End running requests as 'abort' and hold new ones back; returns when none is running."""
        self._paused.set()
        while self._lock.locked():
            await asyncio.sleep(0.002)

    async def resume(self) -> None:
        """Let requests run again."""
        self._paused.clear()

    async def health(self) -> bool:
        """Whether it can generate: open, and with whole weights."""
        return not self._closed and not self._broken

    def metrics(self) -> dict[str, float]:
        """None: nothing queues, fails or is retried here."""
        return {}

    def close(self) -> None:
        """Let go of the model; idempotent."""
        self._closed = True
        self._worker.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            self.model = self._forward = None
            self._views = {}

    def _check_usable(self) -> None:
        """Under the lock: an update that is under way has not failed yet."""
        if self._closed:
            raise UserError("is closed", where=self.description)
        if self._broken:
            raise UserError(self._broken, where=self.description, fix="update the weights again before generating")

    def _check(self, request: GenerationRequest) -> None:
        where = f"request {request.request_id}"
        length = len(request.prompt_ids)
        if not 0 < length < self.context_length:
            raise UserError(f"{length} prompt tokens", where=where, expected=f"1 to {self.context_length - 1} of them")
        if request.sampling.max_new_tokens < 1:
            raise UserError(f"max_new_tokens {request.sampling.max_new_tokens}", where=where, expected="at least 1")
        for token in request.prompt_ids:
            if not 0 <= token < self.vocab_size:
                raise UserError(f"token id {token}", where=where, expected=f"0 to {self.vocab_size - 1}")

    def _generate(
        self, requests: list[GenerationRequest], emit: Callable[[GenerationResult], None]
    ) -> list[GenerationResult]:
        results: list[GenerationResult] = []
        for start in range(0, len(requests), self.max_batch_size):
            with self._lock, torch.inference_mode():
                self._check_usable()
                batch = _Batch(self, requests[start : start + self.max_batch_size], emit)
                results += batch.run(self._paused.is_set)
        return results


class _Batch:
    """Requests generated side by side, one token of each per step; every unfinished row is at the same step."""

    def __init__(
        self, engine: InProcessEngine, requests: list[GenerationRequest], emit: Callable[[GenerationResult], None]
    ) -> None:
        self.engine, self.requests, self.emit = engine, requests, emit
        self.forward = engine._forward
        self.device = self.forward.device
        self.results: list[GenerationResult | None] = [None] * len(requests)
        self.limits = [
            min(request.sampling.max_new_tokens, engine.context_length - len(request.prompt_ids))
            for request in requests
        ]
        # Column s of these holds step s: the token sampled, its log-prob, and the experts it met when it was run.
        self.tokens = np.zeros((len(requests), 0), dtype=np.int64)
        self.log_probs = np.zeros((len(requests), 0), dtype=np.float32)
        self.sampling_mask: list[list[np.ndarray]] = [[] for _ in requests]
        self.routes = np.zeros((len(requests), 0, len(self.forward.sparse_layers), self._topk), self._route_dtype)

    @property
    def _topk(self) -> int:
        return self.forward.config.num_experts_per_tok

    @property
    def _route_dtype(self) -> np.dtype:
        return self.engine._route_dtype

    def run(self, stopped: Callable[[], bool]) -> list[GenerationResult]:
        """Generate until every row is finished, or until `stopped()`: the rest is then an abort."""
        prompts = {request.prompt_ids: None for request in self.requests}
        unique = {prompt: index for index, prompt in enumerate(prompts)}
        lengths = torch.tensor([len(prompt) for prompt in unique], device=self.device)
        width = int(lengths.max())
        ids = torch.zeros(len(unique), width, dtype=torch.int64, device=self.device)
        for prompt, index in unique.items():
            ids[index, : len(prompt)] = torch.tensor(prompt, device=self.device)
        # Requests of one group share a prompt: it is run once, and its cache rows are repeated.
        cache = self.forward.new_cache(len(unique), width + min(max(self.limits), 64))
        logits, prompt_routes = self.forward.prefill(ids, lengths, cache)
        self.prompt_routes = self._pack_routes(prompt_routes)
        self.prompt_index = [unique[request.prompt_ids] for request in self.requests]
        rows = torch.tensor(self.prompt_index, device=self.device)
        cache.select(rows)
        logits, positions = logits[rows], lengths[rows]

        sampler = RowSampler(self.requests, self.limits, self.device)
        stops = self._stop_tokens()
        limits = torch.tensor(self.limits, device=self.device)
        origin = torch.arange(len(self.requests), device=self.device)
        alive = torch.ones(len(self.requests), dtype=torch.bool, device=self.device)
        longest, step = width, 0
        while True:
            tokens, log_probs, sampling_mask = sampler.sample(logits, step)
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
                    tokens, positions, limits, origin, alive = (
                        part[keep] for part in (tokens, positions, limits, origin, alive)
                    )
                    stops = stops[keep] if len(stops) > 1 else stops
                    longest = int(positions.max())
            if stopped():
                for row in origin[alive].tolist():
                    self._finish(row, step + 1, "abort")
                break
            longest += 1
            logits, routes = self.forward.decode(tokens, positions, longest, cache)
            self.routes[origin.cpu().numpy(), step] = self._pack_routes(routes)
            positions, step = positions + 1, step + 1
        return [result for result in self.results if result is not None]

    def _stop_tokens(self) -> torch.Tensor:
        """bool [rows or 1, vocabulary]: the tokens that end a row; one row when all requests agree."""
        wanted = [request.sampling.stop_token_ids for request in self.requests]
        wanted = wanted[:1] if len(set(wanted)) == 1 else wanted
        table = torch.zeros(len(wanted), self.engine.vocab_size, dtype=torch.bool, device=self.device)
        for row, stop_token_ids in enumerate(wanted):
            table[row, list(stop_token_ids)] = True
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
        request, version = self.requests[row], self.engine.weight_version
        routes = None
        if self.engine.return_routes:
            prompt = self.prompt_routes[self.prompt_index[row], : len(request.prompt_ids)]
            routes = np.concatenate([prompt, self.routes[row, : length - 1]])
        result = GenerationResult(
            request_id=request.request_id,
            output_ids=self.tokens[row, :length].copy(),
            behavior_log_probs=self.log_probs[row, :length].copy(),
            weight_versions=np.full(length, version, dtype=np.int64),
            finish_reason=reason,
            routes=routes,
            routes_version=version if routes is not None else None,
            sampling_mask=SamplingMask.of(self.sampling_mask[row][:length]) if request.wants_sampling_mask else None,
        )
        self.results[row] = result
        self.emit(result)


def _load(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The folder's `Qwen3MoeForCausalLM`, ready to generate."""
    from transformers import AutoConfig, Qwen3MoeForCausalLM
    from transformers.utils import logging

    where = str(folder)
    if not (folder / "config.json").is_file():
        raise UserError("no config.json", where=where, expected="a Hugging Face model folder")
    config = AutoConfig.from_pretrained(folder)
    if config.model_type != "qwen3_moe":
        raise UserError(f"model_type {config.model_type!r}", where=where, expected="'qwen3_moe'")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=dtype)
    finally:
        if shown:
            logging.enable_progress_bar()
    model.set_experts_implementation("grouped_mm")
    return model.to(device).eval().requires_grad_(False)
