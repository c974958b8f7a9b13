"""The in-process rollout engine: transformers' models in the trainer's own process, for fast tests and sweeps.

It keeps SGLang's contract (log-probs, routes, weight versions, finish reasons) and adds one thing SGLang has not: a
response is a function of the weights, the prompt and `GenerationRequest.seed`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.model_shape import read_shape
from vespo_megatron.rollout_sglang.checksum import WeightChecksum
from vespo_megatron.rollout_sglang.engine import GenerationRequest, GenerationResult, RolloutEngine, ScoredResponse
from vespo_megatron.rollout_sglang.in_process.batch import Batch
from vespo_megatron.rollout_sglang.in_process.mismatch import AS_IT_IS, EngineMismatch
from vespo_megatron.rollout_sglang.in_process.model import CachedDecoder, load_model, weight_views
from vespo_megatron.rollout_sglang.in_process.scoring import score
from vespo_megatron.rollout_sglang.in_process.step_gate import StepGate
from vespo_megatron.rollout_sglang.readers_writer_lock import ReadersWriterLock

_POLL_S = 0.002
_HEARD_S = 10.0
"""An event loop that has ended hears nothing."""
_SCORED_AT_A_TIME = 64
"""Responses whose logits and hidden states are held at one time."""


class InProcessEngine:
    """A `RolloutEngine` in this process.

    Args:
        model_folder: Hugging Face folder of a model of any of `families/`.
        dtype: of weights, activations and cache; log-probs are float32 in any case.
        device: where it runs.
        max_batch_size: responses generated side by side; more requests wait their turn.
        context_length: prompt and response tokens at most; None is the model's `max_position_embeddings`.
        return_routes: keep the experts of every token.
        mismatch: what it computes otherwise than the trainer, on purpose.

    Raises `UserError` when the folder is another model's.
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
        mismatch: EngineMismatch = AS_IT_IS,
    ) -> None:
        import transformers

        shape = read_shape(model_folder)
        model = load_model(Path(model_folder), dtype, torch.device(device))
        self.context_length = min(context_length or shape.max_position_embeddings, shape.max_position_embeddings)
        self.vocab_size = shape.vocab_size
        self.max_batch_size = max_batch_size
        self.return_routes = return_routes and shape.num_moe_layers > 0
        self.weight_version = 0
        self.description = f"in-process transformers {transformers.__version__} ({device}, {str(dtype)[6:]})"
        self._model: CachedDecoder | None = CachedDecoder(model, shape, self.context_length, mismatch)
        self._views = weight_views(model, shape)
        self._generation_lock = ReadersWriterLock()
        self._gate = StepGate()
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
        for the update's end. All of one call is drawn under one version, but for updates in place.
        """
        for request in requests:
            self._check(request)
        while self._paused.is_set() and not self._closed:
            await asyncio.sleep(_POLL_S)
        loop = asyncio.get_running_loop()
        told = False

        def emit(result: GenerationResult) -> None:
            nonlocal told
            if on_result is not None:
                loop.call_soon_threadsafe(on_result, result)
                told = True

        def wait_until_heard() -> None:
            """So that what a result leads to, a pause for instance, is there before the same step in every run."""
            nonlocal told
            if told:
                told, heard = False, threading.Event()
                loop.call_soon_threadsafe(loop.call_soon, heard.set)  # after what `on_result` has begun
                heard.wait(_HEARD_S)

        results = await loop.run_in_executor(self._worker, self._generate, list(requests), emit, wait_until_heard)
        await asyncio.sleep(0)  # lets the last scheduled on_result calls run before the caller goes on
        return results

    async def score(
        self, responses: Sequence[tuple[np.ndarray, np.ndarray]], temperature: float
    ) -> list[ScoredResponse]:
        """See `RolloutEngine.score`: dials but noise as in generation, and every layer's output."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._worker, self._score, list(responses), temperature)

    def update_weights(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int, *, in_place: bool = False
    ) -> str:
        """Take a complete set of tensors under their names on disk, cast to the engine's dtype; waits for what runs.

        With `in_place` it waits for the step that runs: generations stand still between two steps, and go on with the
        new weights and the cache as it is.

        Returns the `WeightChecksum` of the weights as they now are. Raises `UserError` for an unknown, repeated,
        misshapen or missing tensor; the engine then refuses to generate until an update succeeds, and what stood still
        for it `in_place` ends with the same error.
        """
        # New calls are held back by the lock; what is inside stands or has ended once the gate is held.
        with self._generation_lock.write(wait=not in_place), self._gate.hold(), torch.inference_mode():
            self._broken = f"the weights of version {version} did not arrive whole"
            sent = WeightChecksum()
            missing = dict.fromkeys(self._views)
            for name, tensor in named_tensors:
                where = f"weight update to version {version}, tensor {name}"
                if name not in self._views:
                    raise UserError("unknown name", where=where, expected="a name of the model's checkpoint")
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

    def release_memory(self) -> int:
        """Nothing: the weights are all that is kept between calls, and they are this process's own."""
        return 1

    def resume_memory(self) -> None:
        """Nothing was given back."""

    def await_server(self) -> None:
        """It is up."""

    async def pause(self) -> None:
        """End running requests as 'abort' and hold new ones back; returns when none is running."""
        self._paused.set()
        while self._generation_lock.has_readers:
            await asyncio.sleep(_POLL_S)

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
        self._model, self._views = None, {}

    def _usable_model(self) -> CachedDecoder:
        """The model, to be asked for under the lock: an update that is under way has not failed yet."""
        if self._closed or self._model is None:
            raise UserError("is closed", where=self.description)
        if self._broken:
            raise UserError(self._broken, where=self.description, fix="update the weights again before generating")
        return self._model

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
        self,
        requests: list[GenerationRequest],
        emit: Callable[[GenerationResult], None],
        wait_until_heard: Callable[[], None],
    ) -> list[GenerationResult]:
        results: list[GenerationResult] = []

        def between_steps() -> bool:
            wait_until_heard()
            return self._between_steps()

        with self._generation_lock.read(), self._gate.running(), torch.inference_mode():
            model = self._usable_model()
            for start in range(0, len(requests), self.max_batch_size):
                some = requests[start : start + self.max_batch_size]
                batch = Batch(
                    model,
                    some,
                    [min(each.sampling.max_new_tokens, self.context_length - len(each.prompt_ids)) for each in some],
                    weight_version=lambda: self.weight_version,
                    return_routes=self.return_routes,
                    emit=emit,
                )
                results += batch.run(between_steps)
        return results

    def _between_steps(self) -> bool:
        """Whether to go on, once nobody changes the weights; raises where they did not come whole."""
        self._gate.stand()
        self._usable_model()
        return not self._paused.is_set()

    def _score(self, responses: list[tuple[np.ndarray, np.ndarray]], temperature: float) -> list[ScoredResponse]:
        with self._generation_lock.read(), self._gate.running(), torch.inference_mode():
            model = self._usable_model()
            return [
                scored
                for start in range(0, len(responses), _SCORED_AT_A_TIME)
                for scored in score(
                    model, responses[start : start + _SCORED_AT_A_TIME], temperature, self.weight_version
                )
            ]


if TYPE_CHECKING:
    _: type[RolloutEngine] = InProcessEngine
