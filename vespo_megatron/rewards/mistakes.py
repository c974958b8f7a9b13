"""Judgement of a reward or environment that raises: a mistake in it ends the run, a row it cannot take does not."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from vespo_megatron.errors import UserError

_ROWS, _ROWS_AFTER_A_SCORE = 2, 8
"""Different rows, on all of which it raised: before it has ever scored a response, and after. An asynchronous run has
every prompt's responses scored by a call of their own, which says something of that row alone."""


class Mistakes:
    """What a function has raised since it last scored a response.

    Args:
        name: of the function, for the message.
        where: the recipe's key.
    """

    def __init__(self, name: str, where: str = "env.reward") -> None:
        self._name, self._where = name, where
        self._rows: set[Hashable] = set()
        self._responses, self._first, self._has_scored = 0, "", False

    def note(self, rows: Sequence[Hashable], failures: Sequence[str]) -> None:
        """One call's responses: the row of the data that each is of, and what was raised; empty where nothing was.

        Raises:
            UserError: it raises on every response to several rows. A run whose rewards are all 0 would not say so.
        """
        if not all(failures):
            self._rows, self._responses, self._has_scored = set(), 0, True
            return
        if not self._responses and failures:
            self._first = failures[0]
        self._rows.update(rows)
        self._responses += len(failures)
        if len(self._rows) >= (_ROWS_AFTER_A_SCORE if self._has_scored else _ROWS):
            raise UserError(
                f"{self._name} raised on each of {self._responses} responses; on the first: {self._first}",
                where=self._where,
                fix="mend it, or its arguments in the recipe",
            )
