"""Prompts ready to send, on the disk: rows of Arrow that are looked up when they are asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class PromptRecord:
    """One prompt, ready to send."""

    prompt_id: str
    """Its place in the set: 'train/17'."""
    prompt_ids: tuple[int, ...]
    data_source: str
    ground_truth: Any
    extra_info: dict[str, Any] = field(default_factory=dict)
    set_name: str = ""
    """Of several sets, the one it is from."""
    reward: str = ""
    """The reward of its set, and its arguments as JSON; empty: the recipe's."""


def record_of(line: Mapping[str, Any], label: str, name: str, reward: str) -> PromptRecord:
    """A line of a prepared table as a record."""
    return PromptRecord(
        f"{label}/{line['row']}",
        tuple(line["prompt_ids"]),
        line["data_source"],
        json.loads(line["ground_truth"]),
        json.loads(line["extra_info"]),
        name,
        reward,
    )


class PromptSet(Sequence[PromptRecord]):
    """Some rows of a prepared table (`data.prepare`), in its order.

    Args:
        label: what prompt ids begin with.
        reward: see `PromptRecord`.
        cache: the folder of the table, where what is found out about it may be kept; None: it is in memory.
    """

    def __init__(
        self,
        table: datasets.Dataset,
        label: str,
        *,
        name: str = "",
        reward: str = "",
        cache: Path | None = None,
        positions: np.ndarray | None = None,
    ) -> None:
        self.table, self.label, self.name, self.reward, self.cache = table, label, name, reward, cache
        self.positions = np.arange(len(table)) if positions is None else positions
        """int64 [N], into the table."""

    def __len__(self) -> int:
        return len(self.positions)

    @overload
    def __getitem__(self, index: int) -> PromptRecord: ...

    @overload
    def __getitem__(self, index: slice) -> PromptSet: ...

    def __getitem__(self, index: int | slice) -> PromptRecord | PromptSet:
        if isinstance(index, slice):
            return self.at(self.positions[index])
        return self._record(self.table[int(self.positions[index])])

    def __iter__(self) -> Iterator[PromptRecord]:
        for start in range(0, len(self), _AT_A_TIME):
            columns = self.table[self.positions[start : start + _AT_A_TIME]]
            for values in zip(*columns.values(), strict=True):
                yield self._record(dict(zip(columns, values, strict=True)))

    def at(self, positions: np.ndarray) -> PromptSet:
        """Those rows of the same table."""
        return PromptSet(
            self.table, self.label, name=self.name, reward=self.reward, cache=self.cache, positions=positions
        )

    def numbers(self, column: str) -> np.ndarray:
        """A column of numbers, of these rows."""
        return self.table.data.column(column).to_numpy()[self.positions]

    def find(self, names: Iterable[str]) -> dict[str, PromptRecord]:
        """Prompt ids → records, of those that are here."""
        rows = self.numbers("row")
        found = {}
        for name in names:
            label, _, number = name.rpartition("/")
            if label == self.label and number.isdecimal():
                place = int(np.searchsorted(rows, int(number)))
                if place < len(rows) and rows[place] == int(number):
                    found[name] = self[place]
        return found

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of all that rows, in their order, ask for and are scored by, as tokenised now."""
        digest = hashlib.blake2b(repr((self.label, self.reward)).encode(), digest_size=8)
        digest.update(np.ascontiguousarray(self.numbers("content")).tobytes())
        return digest.hexdigest()

    def _record(self, row: dict[str, Any]) -> PromptRecord:
        return record_of(row, self.label, self.name, self.reward)


_AT_A_TIME = 1000


class SeveralSets(Sequence[PromptRecord]):
    """Sets one after another, as one."""

    def __init__(self, sets: Sequence[PromptSet]) -> None:
        self.sets = list(sets)
        self._ends = np.cumsum([len(each) for each in sets])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @overload
    def __getitem__(self, index: int) -> PromptRecord: ...

    @overload
    def __getitem__(self, index: slice) -> SeveralSets: ...

    def __getitem__(self, index: int | slice) -> PromptRecord | SeveralSets:
        if isinstance(index, slice):
            places = np.arange(len(self))[index]
            parts = []
            for each, start, end in zip(self.sets, [0, *self._ends[:-1]], self._ends, strict=True):
                here = places[(places >= start) & (places < end)] - start
                parts.append(each.at(each.positions[here]))
            return SeveralSets(parts)
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self.sets[number][index - int(self._ends[number]) + len(self.sets[number])]

    def __iter__(self) -> Iterator[PromptRecord]:
        for each in self.sets:
            yield from each

    def find(self, names: Iterable[str]) -> dict[str, PromptRecord]:
        """See `PromptSet.find`."""
        names = list(names)
        return {name: record for each in self.sets for name, record in each.find(names).items()}

    @property
    def fingerprint(self) -> str:
        """Of all of them; a single one's own."""
        if len(self.sets) == 1:
            return self.sets[0].fingerprint
        return hashlib.blake2b("".join(each.fingerprint for each in self.sets).encode(), digest_size=8).hexdigest()
