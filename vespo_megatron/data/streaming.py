"""A set read as it is needed, for those that fit no disk: blocks of rows, each shuffled by (seed, epoch, block).

Where a run is in it is a block, where that begins, and a place in it: going on reads that block once more, and is
exact to the row.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterable, Mapping
from typing import Any

from vespo_megatron.data.prepare import Job
from vespo_megatron.data.prompt_set import PromptRecord, record_of
from vespo_megatron.data.reading import stream
from vespo_megatron.data.rows import Filter, too_long
from vespo_megatron.errors import UserError
from vespo_megatron.recipe.schema import Recipe, SetConfig


class StreamedPrompts:
    """A set's prompts, epoch after epoch (`data.prompt_stream.Prompts`).

    Rows that the filter leaves out are passed over, and those that are too long where the recipe drops them. Ground
    truths are not judged before a response is scored.

    Raises:
        UserError: as `reading.stream`.
    """

    def __init__(self, config: SetConfig, job: Job, recipe: Recipe, *, name: str, label: str, where: str) -> None:
        self._rows, files = stream(config, where)
        self._job, self._recipe, self._name, self._label, self._where = job, recipe, name, label, where
        self._filters = [Filter.of(text, f"{where}: filter") for text in config.filter]
        self._reward = config.reward_choice
        self._source = hashlib.blake2b("\n".join([*files, job.template.fingerprint or ""]).encode(), digest_size=8)
        self.epoch = self.block = self.start = self.position = 0
        self._records: list[PromptRecord] | None = None
        self._read = 0
        """Rows of the source in the block that is held."""

    def first(self) -> PromptRecord:
        """See `Prompts.first`."""
        return self._held()[0]

    def find(self, names: Iterable[str]) -> dict[str, PromptRecord]:
        """Those of them in the block that is held and the ones before it: earlier rows are read once more."""
        wanted = set(names)
        rows = {int(name.rpartition("/")[2]) for name in wanted if name.rpartition("/")[0] == self._label}
        if not rows:
            return {}
        first, last = min(rows), max(rows)
        records = self._prepared(itertools.islice(self._rows.skip(first), last - first + 1), first)
        return {record.prompt_id: record for record in records if record.prompt_id in wanted}

    def take(self, count: int) -> list[PromptRecord]:
        """See `Prompts.take`; what a batch that spans two epochs has already is passed over."""
        taken: dict[str, PromptRecord] = {}
        begun = self.epoch
        while len(taken) < count:
            records = self._held()
            if self.position == len(records):
                self._next()
                if self.epoch > begun + 1:
                    raise UserError(
                        f"is {count}",
                        where="grpo.num_prompts_per_step",
                        expected="at most the training prompts there are",
                    )
                continue
            record = records[self.position]
            taken.setdefault(record.prompt_id, record)
            self.position += 1
        return list(taken.values())

    def _held(self) -> list[PromptRecord]:
        """The block, read where it is not yet; the next ones while it has nothing that can be used."""
        begun = self.epoch
        while self._records is None:
            size = self._recipe.data.shuffle_buffer
            raw = list(itertools.islice(self._rows.skip(self.start), size))
            self._read = len(raw)
            records = self._prepared(raw, self.start)
            if self._recipe.data.shuffle:
                random.Random(f"{self._recipe.grpo.seed}/{self.epoch}/{self.block}").shuffle(records)
            self._records = records
            if not records:
                if self.epoch > begun + 1:
                    raise UserError("has no row that can be used", where=self._where, expected="at least one prompt")
                self._next()
        return self._records

    def _next(self) -> None:
        if self._read < self._recipe.data.shuffle_buffer:  # that was the last one
            self.epoch, self.block, self.start = self.epoch + 1, 0, 0
        else:
            self.block, self.start = self.block + 1, self.start + self._read
        self.position, self._records = 0, None

    def _prepared(self, rows: Iterable[dict[str, Any]], start: int) -> list[PromptRecord]:
        numbered = [(start + number, row) for number, row in enumerate(rows)]
        numbered = [(number, row) for number, row in numbered if all(each.takes(row) for each in self._filters)]
        if not numbered:
            return []
        names = list(numbered[0][1])
        self._job.columns.check(names, self._where)
        table = self._job({name: [row[name] for _, row in numbered] for name in names})
        records = []
        for place, (number, _) in enumerate(numbered):
            line = {name: values[place] for name, values in table.items()} | {"row": number}
            if line["problem"]:
                raise UserError(line["problem"], where=f"{self._where}, row {number}")
            length, limit = len(line["prompt_ids"]), self._recipe.data.max_input_seq_length
            if length > limit and self._recipe.data.on_long_prompt == "error":
                raise too_long(length, limit, f"{self._where}, row {number}")
            if length <= limit:
                records.append(record_of(line, self._label, self._name, self._reward))
        return records

    def state_dict(self) -> dict[str, Any]:
        """See `Prompts.state_dict`."""
        place = {"epoch": self.epoch, "block": self.block, "start": self.start, "position": self.position}
        return place | {"buffer": self._recipe.data.shuffle_buffer, "stream": self._source.hexdigest()}

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """See `Prompts.load_state_dict`; files are told apart by name and size."""
        same = (state.get("stream"), state.get("buffer")) == (
            self._source.hexdigest(),
            self._recipe.data.shuffle_buffer,
        )
        if not same:
            if self._recipe.data.on_change == "restart":
                return False
            raise UserError(
                "are others, or data.shuffle_buffer is another, than when the run was saved",
                where=f"the files of {self._where}",
                fix="give it the data (and tokenizer) it had, or set data.on_change=restart to begin anew",
            )
        self.epoch, self.block, self.start = state["epoch"], state["block"], state["start"]
        self._records = None
        self.position = state["position"]
        return True
