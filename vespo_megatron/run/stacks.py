"""What a rank is in, read from faulthandler's dump of its stacks: a collective, or a line of code. Pure."""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable
from dataclasses import dataclass

_FRAME = re.compile(r'^  File "(?P<file>.+)", line (?P<line>\d+|\?\?\?) in (?P<function>.+)$')
_THREAD = re.compile(r"^(?:Current thread|Thread) 0x")
_DISTRIBUTED = ("torch/distributed/distributed_c10d.py", "torch/distributed/c10d_logger.py")
_WAITS = re.compile(r"\.(wait|synchronize)\(")
"""Lines that wait for an operation that was started elsewhere: megatron-core's point-to-point requests."""


@dataclass(frozen=True)
class Frame:
    """One line of a stack."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.function} ({'/'.join(self.file.split('/')[-3:])}:{self.line})"


@dataclass(frozen=True)
class Whereabouts:
    """What one rank is in."""

    collective: str
    """The torch.distributed call it waits in; empty when it is in none."""
    frame: Frame | None
    """The line that made the call, or the innermost line when there is none; None without a stack."""

    def __str__(self) -> str:
        if self.frame is None:
            return "left no stack"
        return f"{self.collective} called by {self.frame}" if self.collective else f"{self.frame}, in no collective"


@dataclass(frozen=True)
class NoStack:
    """Why there is no stack of a rank to read."""

    reason: str
    elsewhere: bool = False
    """It runs on another machine, so that nothing can be asked of it from here."""

    def __str__(self) -> str:
        return self.reason


def parse(dump: str) -> list[list[Frame]]:
    """The last dump in faulthandler's text: the frames of each thread, innermost first; the main thread is last."""
    threads: list[list[Frame]] = []
    for line in dump.splitlines():
        if _THREAD.match(line):
            threads.append([])
        elif (match := _FRAME.match(line)) and threads:
            number = int(match["line"]) if match["line"].isdigit() else 0
            threads[-1].append(Frame(match["file"], number, match["function"]))
    return threads


def whereabouts(dump: str, source: Callable[[str, int], str] = linecache.getline) -> Whereabouts:
    """What the rank with this dump is in: a collective of any thread (autograd has its own), else the main thread.

    Args:
        source: (file, line number) → that line, to tell a wait for a point-to-point request.
    """
    threads = [frames for frames in parse(dump) if frames]
    if not threads:
        return Whereabouts("", None)
    for frames in reversed(threads):
        found = _collective(frames, source)
        if found is not None:
            return found
    return Whereabouts("", threads[-1][0])


def _collective(frames: list[Frame], source: Callable[[str, int], str]) -> Whereabouts | None:
    innermost = frames[0]
    if innermost.file.endswith(_DISTRIBUTED):
        inside = [frame for frame in _leading(frames) if frame.file.endswith(_DISTRIBUTED[0])]
        caller = frames[len(_leading(frames))] if len(frames) > len(_leading(frames)) else innermost
        return Whereabouts(inside[-1].function if inside else innermost.function, caller)
    if "megatron/" in innermost.file and _WAITS.search(source(innermost.file, innermost.line)):
        return Whereabouts("wait", innermost)
    return None


def _leading(frames: list[Frame]) -> list[Frame]:
    count = next((index for index, frame in enumerate(frames) if not frame.file.endswith(_DISTRIBUTED)), len(frames))
    return frames[:count]
