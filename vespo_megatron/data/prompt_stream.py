"""The prompts a run draws from: epoch after epoch, from a position that can be saved; several sets by their weights."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np

from vespo_megatron.data.prompt_set import PromptRecord
from vespo_megatron.errors import UserError


class Prompts(Protocol):
    """Where a controller gets its prompts."""

    def take(self, count: int) -> list[PromptRecord]:
        """The next `count` prompts, no prompt twice in one call. Raises UserError where there are not so many."""

    def first(self) -> PromptRecord:
        """Some prompt, which counts as not taken."""

    def find(self, names: Iterable[str]) -> dict[str, PromptRecord]:
        """Prompt ids → records, of those that are here."""

    def state_dict(self) -> dict[str, Any]:
        """Position, and in what, for a checkpoint."""

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Go on where `state` was taken; False where that was in other records, and these are begun instead.

        Raises:
            UserError: they are others, and `data.on_change` is error.
        """


class Records(Protocol):
    """Prompts that can be looked up."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> PromptRecord: ...

    @property
    def fingerprint(self) -> str:
        """Of all of them, in their order."""

    def find(self, names: Iterable[str]) -> dict[str, PromptRecord]:
        """Prompt ids → records."""


class PromptStream:
    """Prompts without end: epoch after epoch, shuffled by (seed, epoch) alone.

    Args:
        source: where the records are from, for messages.
        on_change: what a position in other records leads to: an "error", or to "restart" in these.
    """

    def __init__(
        self,
        records: Records,
        *,
        seed: int,
        shuffle: bool = True,
        source: str = "",
        on_change: Literal["error", "restart"] = "error",
    ) -> None:
        self.records, self.seed, self.shuffle = records, seed, shuffle
        self.source, self.on_change = source, on_change
        self._begin(0, [])

    def _begin(self, epoch: int, late: list[int]) -> None:
        """An epoch; `late` are rows that go to its end, since the batch that it begins in has them already."""
        order = list(range(len(self.records)))
        if self.shuffle:
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
        if late:
            taken = set(late)
            order.sort(key=taken.__contains__)
        self.epoch, self.position, self._late = epoch, 0, late
        self._order = np.array(order, dtype=np.int64)

    def first(self) -> PromptRecord:
        """See `Prompts.first`."""
        return self.records[0]

    def find(self, names: Iterable[str]) -> dict[str, PromptRecord]:
        """See `Prompts.find`."""
        return self.records.find(names)

    def take(self, count: int) -> list[PromptRecord]:
        """See `Prompts.take`."""
        if count > len(self.records):
            raise UserError(
                f"is {count}",
                where="grpo.num_prompts_per_step",
                expected=f"at most the {len(self.records)} training prompts",
            )
        taken: list[int] = []
        while len(taken) < count:
            if self.position == len(self._order):
                self._begin(self.epoch + 1, taken.copy())
            taken.append(int(self._order[self.position]))
            self.position += 1
        return [self.records[index] for index in taken]

    @cached_property
    def fingerprint(self) -> str:
        """Of the records, in the order of the set."""
        return self.records.fingerprint

    def state_dict(self) -> dict[str, Any]:
        """See `Prompts.state_dict`."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "late": list(self._late),
            "count": len(self.records),
            "source": self.source,
            "content": self.fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """See `Prompts.load_state_dict`. Checkpoints of before contents' fingerprints tell by number."""
        count, known = state["count"], state.get("content", self.fingerprint)
        if (count, known) == (len(self.records), self.fingerprint):
            self._begin(state["epoch"], list(state.get("late", ())))
            if "order" in state:  # of before `late`
                self._order = np.array(state["order"], dtype=np.int64)
            self.position = state["position"]
            return True
        if self.on_change == "restart":
            return False
        raise UserError(
            f"holds {len(self.records)} prompts, fingerprint {self.fingerprint}, of {self.source or 'other data'}",
            where="data.train",
            expected=f"{count} prompts, fingerprint {known}, of {state.get('source') or 'its data'}, as when saved",
            fix="give it the data (and tokenizer) it had, or set data.on_change=restart to begin these prompts anew",
        )


class WeightedStreams:
    """Several streams: each prompt is the next one of a stream that is drawn by its weight, from (seed, number) alone.

    Args:
        streams: by the sets' names; each goes through its own epochs.
        weights: positive, of each.
    """

    def __init__(self, streams: Mapping[str, Prompts], weights: Mapping[str, float], *, seed: int) -> None:
        self.streams, self.seed, self.drawn = dict(streams), seed, 0
        total = sum(weights.values())
        self._names = list(self.streams)
        self._bounds = np.cumsum([weights[name] / total for name in self._names])

    def first(self) -> PromptRecord:
        """See `Prompts.first`."""
        return self.streams[self._names[0]].first()

    def find(self, names: Iterable[str]) -> dict[str, PromptRecord]:
        """See `Prompts.find`."""
        names = list(names)
        return {name: record for stream in self.streams.values() for name, record in stream.find(names).items()}

    def take(self, count: int) -> list[PromptRecord]:
        """See `Prompts.take`."""
        chosen = [self._choose(self.drawn + number) for number in range(count)]
        taken = {name: iter(self.streams[name].take(chosen.count(name))) for name in set(chosen)}
        self.drawn += count
        return [next(taken[name]) for name in chosen]

    def _choose(self, number: int) -> str:
        point = random.Random(f"{self.seed}/set/{number}").random()
        place = int(np.searchsorted(self._bounds, point, side="right"))
        return self._names[min(place, len(self._names) - 1)]

    def state_dict(self) -> dict[str, Any]:
        """See `Prompts.state_dict`."""
        return {"drawn": self.drawn, "sets": {name: stream.state_dict() for name, stream in self.streams.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """See `Prompts.load_state_dict`. Weights may change between."""
        sets = state.get("sets", {})
        if set(sets) != set(self.streams):
            raise UserError(
                f"has sets {', '.join(sorted(self.streams))}",
                where="data.train.sets",
                expected=", ".join(sorted(sets)) or "one set, as when saved",
                fix="give the run the sets it had, by their names",
            )
        known = [stream.load_state_dict(sets[name]) for name, stream in self.streams.items()]
        self.drawn = state["drawn"]
        return all(known)
