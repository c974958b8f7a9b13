"""An engine in simulated time: every response has a length of its own, and each that runs gets one token a tick."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable

import numpy as np

from vespo_megatron.rollout_sglang.engine import GenerationResult


class SimulatedEngine:
    """Enough room for everything that is asked for; log-probs are −1, tokens the weight version that drew them.

    Args:
        length: prompt ids and index of a response in its group → its tokens.
    """

    description = "a simulated engine"
    weight_version = 0

    def __init__(self, length: Callable[[tuple[int, ...], int], int]) -> None:
        self.length, self.ticks = length, 0
        self._paused = False
        self._drawn: dict[str, int] = {}
        """Tokens of earlier turns, by response."""

    async def generate(self, requests, *, on_result=None):
        results, began = {}, self.ticks
        left = {}
        for request in requests:
            name = "/".join(request.request_id.split("/")[:3])
            prompt = request.prompt_ids[: len(request.prompt_ids) - self._drawn.get(name, 0)]
            left[request.request_id] = self.length(prompt, int(name.split("/")[2])) - self._drawn.get(name, 0)
        for request in sorted(requests, key=lambda each: left[each.request_id]):
            if not self._paused:
                self.ticks = began + left[request.request_id]
            count = min(left[request.request_id], self.ticks - began)
            name = "/".join(request.request_id.split("/")[:3])
            self._drawn[name] = self._drawn.get(name, 0) + count
            results[request.request_id] = GenerationResult(
                request.request_id,
                np.full(count, self.weight_version),
                np.full(count, -1.0, np.float32),
                np.full(count, self.weight_version),
                "stop" if count == left[request.request_id] else "abort",
            )
            if on_result is not None:
                on_result(results[request.request_id])
            await asyncio.sleep(0)  # lets a pause begin
        return [results[request.request_id] for request in requests]

    async def pause(self):
        self._paused = True

    async def resume(self):
        self._paused = False

    def update_weights(self, stream, version, *, in_place=False):
        self.weight_version = version

    def metrics(self):
        return {}

    def close(self):
        pass


def lognormal_length(seed: int = 0, mean: float = 4.0, sigma: float = 1.0) -> Callable[[tuple[int, ...], int], int]:
    """A length for each (prompt, index), the same whenever it is asked for; e^mean is the median."""

    def length(prompt, index):
        number = zlib.crc32(f"{seed}/{prompt}/{index}".encode())
        return 1 + int(np.random.default_rng(number).lognormal(mean, sigma))

    return length
