"""What a controller draws its prompts from: a stream, prompts that were given back to it, and a curriculum."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

from vespo_megatron.data.curriculum import Curriculum
from vespo_megatron.data.prompt_set import PromptRecord
from vespo_megatron.data.prompt_stream import Prompts
from vespo_megatron.errors import UserError
from vespo_megatron.recipe.schema import CurriculumConfig

_PATIENCE = 1000
"""Prompts in a row that a batch has already, before the set counts as too small."""


class DataSource(Protocol):
    """A source of prompts whose whole state goes into checkpoints."""

    def take(self, count: int, *, avoid: Collection[str] = ()) -> list[PromptRecord]:
        """The next `count` prompts, no prompt twice in one call, and none whose id is in `avoid`.

        Raises UserError where there are not so many.
        """

    def give_back(self, records: Sequence[PromptRecord]) -> None:
        """These were taken and are not trained on: they come first, in this order, before anything else."""

    def report(self, solved: Mapping[str, float]) -> None:
        """Prompt id → share of its responses that were solved."""

    def metrics(self) -> dict[str, float]:
        """Since the run began, by metric name (`rollout/…`)."""

    def first(self) -> PromptRecord:
        """Some prompt, which counts as not taken."""

    def find(self, names: Iterable[str]) -> dict[str, PromptRecord]:
        """Prompt ids → records, of those that are here."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides which prompts come next."""

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Go on where `state` was taken; see `Prompts.load_state_dict`."""


class PromptSource:
    """See `DataSource`; over any stream. Where nothing was given back or rests, its prompts are the stream's."""

    def __init__(self, stream: Prompts, curriculum: CurriculumConfig | None = None) -> None:
        self.stream, self.curriculum = stream, Curriculum(curriculum or CurriculumConfig())
        self._returned: list[PromptRecord] = []

    def take(self, count: int, *, avoid: Collection[str] = ()) -> list[PromptRecord]:
        """See `DataSource.take`. What comes and is in `avoid` is next afterwards."""
        if not (self._returned or avoid or self.curriculum.config.rest):
            return self.stream.take(count)
        taken: dict[str, PromptRecord] = {}
        aside: list[PromptRecord] = []
        waiting, in_a_row = self._returned, 0
        while len(taken) < count:
            given_back = bool(waiting)
            record = waiting.pop(0) if given_back else self.stream.take(1)[0]
            if record.prompt_id in taken or record.prompt_id in avoid:
                aside += [record] if record.prompt_id not in {each.prompt_id for each in aside} else []
                in_a_row += 1
                if in_a_row > _PATIENCE:
                    raise UserError(
                        f"finds no other prompt: the batch has {len(taken)} of {count}, and {len(avoid)} are under way",
                        where="data.train",
                        expected="at least grpo.num_prompts_per_step times grpo.oversample prompts",
                    )
                continue
            in_a_row = 0
            if given_back or self.curriculum.admits(record.prompt_id):
                taken[record.prompt_id] = record
        self._returned = aside + waiting
        return list(taken.values())

    def give_back(self, records: Sequence[PromptRecord]) -> None:
        """See `DataSource.give_back`."""
        self._returned = [*records, *self._returned]

    def report(self, solved: Mapping[str, float]) -> None:
        """See `DataSource.report`."""
        for prompt_id, rate in solved.items():
            self.curriculum.report(prompt_id, rate)

    def first(self) -> PromptRecord:
        """See `DataSource.first`."""
        return self.stream.first()

    def find(self, names: Iterable[str]) -> dict[str, PromptRecord]:
        """See `DataSource.find`."""
        return self.stream.find(names)

    def metrics(self) -> dict[str, float]:
        """Since the run began."""
        return {"rollout/passed_over": float(self.curriculum.passed_over)} if self.curriculum.config.rest else {}

    def state_dict(self) -> dict[str, Any]:
        """See `DataSource.state_dict`."""
        return {
            "stream": self.stream.state_dict(),
            "returned": [record.prompt_id for record in self._returned],
            "curriculum": self.curriculum.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """See `DataSource.load_state_dict`; a checkpoint of before has the stream's state alone."""
        if "curriculum" not in state:
            return self.stream.load_state_dict(state)
        if not self.stream.load_state_dict(state["stream"]):
            return False
        records = self.stream.find(state["returned"])
        self._returned = [records[name] for name in state["returned"]]
        self.curriculum.load_state_dict(state["curriculum"])
        return True
