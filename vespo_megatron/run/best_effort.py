"""Records that may be lost, loudly: a full disk costs what could not be written, and training goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class BestEffort:
    """Says once that a kind of record cannot be written, and once that it can again.

    Args:
        say: shows a line to people.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._failed: Counter[str] = Counter()

    @contextmanager
    def writing(self, what: str, meanwhile: str = "training goes on without") -> Iterator[None]:
        """Within the block `what` is written; an OSError ends the block and is told, not raised.

        Args:
            meanwhile: what becomes of it, for the message.
        """
        try:
            yield
        except OSError as error:
            if not self._failed[what]:
                self._say(f"vespo-megatron: cannot write {what} ({error.strerror or error}); {meanwhile}")
            self._failed[what] += 1
        else:
            if failures := self._failed.pop(what, 0):
                self._say(f"vespo-megatron: {what}: written again, after {failures} that failed")
