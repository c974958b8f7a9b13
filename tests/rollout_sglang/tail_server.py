"""A `FaultServer` whose responses have lengths of a heavy tail, and take time by the token; a pause ends them."""

from __future__ import annotations

import threading
import time
import zlib

import numpy as np
from fault_server import FaultServer


class TailServer(FaultServer):
    """Every prompt of `prompt_length` tokens is a first turn's; the same response goes on in later ones.

    Lengths are lognormal, of median e^`mean`, and belong to prompt and place in the group; a token takes `tick_s`.
    """

    def __init__(self, prompt_length, *, mean=4.0, sigma=1.0, tick_s=0.001, **settings):
        self.prompt_length, self.mean, self.sigma, self.tick_s = prompt_length, mean, sigma, tick_s
        self.paused = threading.Event()
        super().__init__(**settings)

    def answer(self, handler, body):
        if handler.path == "/pause_generation":
            self.paused.set()
        elif handler.path == "/continue_generation":
            self.paused.clear()
        super().answer(handler, body)

    def length(self, request_id, prompt):
        """Of the whole response that a request is a turn of."""
        place = request_id.partition("#")[0].split("/")[2]
        number = zlib.crc32(f"{prompt}/{place}".encode())
        return 1 + int(np.random.default_rng(number).lognormal(self.mean, self.sigma))

    def _generate(self, handler, body):
        if body["rid"][0].count("/") < 2:  # the probe
            return super()._generate(handler, body)
        left = [
            self.length(rid, ids[: self.prompt_length]) - (len(ids) - self.prompt_length)
            for rid, ids in zip(body["rid"], body["input_ids"], strict=True)
        ]
        began = time.monotonic()
        self.paused.wait(max(left) * self.tick_s)
        drawn = int((time.monotonic() - began) / self.tick_s)
        replies = []
        for rid, ids, count in zip(body["rid"], body["input_ids"], left, strict=True):
            reply = self._reply(ids, min(count, drawn), "no routes")
            reply["meta_info"] |= {"id": rid, "finish_reason": {"type": "stop" if drawn >= count else "abort"}}
            replies.append(reply)
        return self._send(handler, 200, replies)
