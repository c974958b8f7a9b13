"""Environments that tests make: some answer, some hang, die or raise as a turn tells them."""

from __future__ import annotations

import asyncio
import os
import time

from vespo_megatron.environments import Step


class Echo:
    """Says how long each turn was, in words of a tool, `turns` times; every turn earns its number."""

    def __init__(self, turns: int = 3, role: str = "tool") -> None:
        if turns < 1:
            raise ValueError("no turns")
        self.turns, self.role, self.begun = turns, role, 0

    def reset(self, record):
        self.begun += 1

    def step(self, turn):
        done = turn.number + 1 >= self.turns
        said = [{"role": self.role, "content": f"{len(turn.token_ids)} tokens"}]
        return Step(said, reward=float(turn.number), done=done, tool_errors=turn.number % 2)


class AsyncEcho(Echo):
    async def reset(self, record):
        await asyncio.sleep(0.01)

    async def step(self, turn):
        await asyncio.sleep(0.01)
        return super().step(turn)


class Ids:
    """Token ids in, token ids out."""

    def __init__(self, prompt=(5, 6, 7), said=(9, 8), turns: int = 2) -> None:
        self.prompt, self.said, self.turns = prompt, said, turns

    def reset(self, record):
        return self.prompt

    def step(self, turn):
        return self.said, 0.5, turn.number + 1 >= self.turns


class Hostile:
    """Does what its prompt's ground truth says, at that turn."""

    def reset(self, record):
        self.what, self.when = str(record.ground_truth).split() + [""] * (2 - len(str(record.ground_truth).split()))
        self.act("reset")

    def step(self, turn):
        self.act(str(turn.number))
        return "on", 1.0, turn.number == 2

    def act(self, now):
        if now != self.when:
            return
        if self.what == "sleep":
            time.sleep(60)
        if self.what == "die":
            os._exit(9)
        if self.what == "raise":
            raise RuntimeError("as told")
        if self.what == "nan":
            raise ValueError("no number")


class Pids:
    """Says which process it is in."""

    def reset(self, record):
        return [os.getpid() % 100]

    def step(self, turn):
        return str(os.getpid()), 0.0, False
