"""A discrete-event model of rollouts beside training: who waits for whom, and how stale the data gets.

The rule of admission is not modelled but run: it is `trainer.staleness.StalenessBuffer` itself. Time is simulated;
between two events every running response of a server gains tokens at one rate, so that an event costs a heap operation
however long responses are.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from vespo_megatron.controller.staleness import Group, StalenessBuffer
from vespo_megatron.plan.timing import Server

DrawLength = Callable[[random.Random], float]


@dataclass(frozen=True)
class Pipeline:
    """What a run is, as far as its pace goes. Seconds and tokens."""

    batch_groups: int
    group_size: int
    steps: int
    server: Server
    servers: int
    draw_length: DrawLength
    train_seconds: float
    """Of one step."""
    sync_seconds: float
    reply_seconds: float = 0.0
    """Of a response, from its group's last token to the buffer: reply and reward, one after the other."""
    asynchronous: bool = False
    max_staleness: float = 0.0
    sync_every: int = 1
    drain: bool = False


@dataclass
class Forecast:
    """What came of it."""

    seconds: float = 0.0
    trainer_idle: float = 0.0
    engine_idle: float = 0.0
    """Nothing ran."""
    responses: int = 0
    lag_tokens: dict[int, float] = field(default_factory=dict)
    """Tokens by the number of weight versions they were behind when they were trained on."""

    @property
    def responses_per_second(self) -> float:
        return self.responses / self.seconds

    @property
    def lag_mean(self) -> float:
        total = sum(self.lag_tokens.values())
        return sum(lag * tokens for lag, tokens in self.lag_tokens.items()) / total if total else 0.0


@dataclass
class _Response:
    group: int
    length: float
    began: float = 0.0
    """On its server's clock of tokens."""
    spans: list[tuple[int, float]] = field(default_factory=list)
    """Weight version, tokens."""


class _Servers:
    """Running responses on servers of equal speed, and a queue before them."""

    def __init__(self, server: Server, count: int) -> None:
        self.speed, self.slots = server, max(1, server.slots)
        self.running: list[list[tuple[float, int, _Response]]] = [[] for _ in range(count)]
        self.clocks = [0.0] * count
        self.queue: list[_Response] = []
        self._number = 0

    @property
    def busy(self) -> bool:
        return any(self.running)

    def send(self, responses: list[_Response]) -> None:
        """A group stays together, on the server with the least to do; what does not fit waits."""
        place = min(range(len(self.running)), key=lambda i: len(self.running[i]))
        for response in responses:
            if len(self.running[place]) < self.slots:
                self._begin(place, response)
            else:
                self.queue.append(response)

    def next_end(self) -> float:
        """Seconds until a response ends; infinite when none runs."""
        return min(
            (
                (heap[0][0] - clock) * self.speed.step(len(heap))
                for heap, clock in zip(self.running, self.clocks, strict=True)
                if heap
            ),
            default=float("inf"),
        )

    def advance(self, seconds: float, version: int) -> list[_Response]:
        """Let time pass, at most until `next_end`; returns what has ended, of whole length."""
        ended = []
        for place, heap in enumerate(self.running):
            if not heap:
                continue
            self.clocks[place] += seconds / self.speed.step(len(heap))
            while heap and heap[0][0] <= self.clocks[place] + 1e-9:
                _, _, response = heapq.heappop(heap)
                self._span(response, place, version)
                ended.append(response)
        for place, heap in enumerate(self.running):
            while self.queue and len(heap) < self.slots:
                self._begin(place, self.queue.pop(0))
        return ended

    def new_version(self, old: int) -> None:
        """What runs has drawn its tokens so far from `old`."""
        for place, heap in enumerate(self.running):
            for _, _, response in heap:
                self._span(response, place, old)
                response.began = self.clocks[place]

    def _span(self, response: _Response, place: int, version: int) -> None:
        tokens = self.clocks[place] - response.began
        if tokens > 0:
            response.spans.append((version, tokens))

    def _begin(self, place: int, response: _Response) -> None:
        response.began = self.clocks[place]
        self._number += 1
        heapq.heappush(self.running[place], (self.clocks[place] + response.length, self._number, response))


def simulate(pipeline: Pipeline, seed: int = 0) -> Forecast:
    """Run the model to its last step."""
    return _Simulation(pipeline, seed).run()


class _Simulation:
    def __init__(self, pipeline: Pipeline, seed: int) -> None:
        self.pipeline, self.chance = pipeline, random.Random(seed)
        self.now, self.version = 0.0, 0
        self.servers = _Servers(pipeline.server, pipeline.servers)
        # A synchronous run is one whose buffer never holds more than the batch that is waited for.
        self.buffer = StalenessBuffer(
            pipeline.max_staleness if pipeline.asynchronous else 0.0,
            pipeline.batch_groups,
            pipeline.sync_every if pipeline.asynchronous else 1,
        )
        self.groups: dict[int, Group] = {}
        self.left: dict[int, int] = {}
        self.done: dict[int, list[_Response]] = {}
        self.replies: deque[tuple[float, int]] = deque()
        self.replies_end = 0.0
        self.forecast = Forecast()
        self.admitting = True

    def run(self) -> Forecast:
        pipeline, forecast = self.pipeline, self.forecast
        for step in range(1, pipeline.steps + 1):
            began = self.now
            self._until(lambda: self.buffer.ready())
            forecast.trainer_idle += self.now - began
            for group in self.buffer.take():
                for response in self.done.pop(group.number):
                    forecast.responses += 1
                    for version, tokens in response.spans:
                        lag = self.version - version
                        forecast.lag_tokens[lag] = forecast.lag_tokens.get(lag, 0.0) + tokens
            self._for(pipeline.train_seconds)
            if step % self.buffer.sync_every == 0:
                self._push()
        forecast.seconds = self.now
        return forecast

    def _push(self) -> None:
        if self.pipeline.drain and self.pipeline.asynchronous:
            self.admitting = False
            self._until(lambda: not self.servers.busy)
            self.admitting = True
        self.servers.new_version(self.version)
        self.now += self.pipeline.sync_seconds  # nothing runs meanwhile
        self.forecast.engine_idle += self.pipeline.sync_seconds
        self.version += 1
        for group in self.buffer.new_version(self.version):
            self.groups.pop(group.number, None)

    def _for(self, seconds: float) -> None:
        end = self.now + seconds
        self._until(lambda: self.now >= end - 1e-12, limit=end)

    def _until(self, condition: Callable[[], bool], limit: float = float("inf")) -> None:
        self._admit()
        while not condition():
            reply = self.replies[0][0] - self.now if self.replies else float("inf")
            wait = max(0.0, min(self.servers.next_end(), reply, limit - self.now))
            if wait == float("inf"):
                raise AssertionError("nothing runs and nothing is ready")
            if not self.servers.busy:
                self.forecast.engine_idle += wait
            self.now += wait
            for response in self.servers.advance(wait, self.version):
                self._end(response)
            while self.replies and self.replies[0][0] <= self.now + 1e-12:
                self.buffer.arrive(self.groups.pop(self.replies.popleft()[1]), [])
            self._admit()

    def _end(self, response: _Response) -> None:
        self.done.setdefault(response.group, []).append(response)
        self.left[response.group] -= 1
        if not self.left[response.group]:
            group_seconds = self.pipeline.group_size * self.pipeline.reply_seconds
            self.replies_end = max(self.replies_end, self.now) + group_seconds
            self.replies.append((self.replies_end, response.group))

    def _admit(self) -> None:
        while self.admitting and self.buffer.room():
            group = self.buffer.admit("")
            size = self.pipeline.group_size
            self.groups[group.number], self.left[group.number] = group, size
            lengths = [self.pipeline.draw_length(self.chance) for _ in range(size)]
            self.servers.send([_Response(group.number, max(1.0, length)) for length in lengths])
