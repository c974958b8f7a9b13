"""Prompts in a list, for streams and controllers that need no files."""

from __future__ import annotations

from collections.abc import Iterable

from vespo_megatron.data.prompt_set import PromptRecord


class ListedPrompts(list[PromptRecord]):
    """As `data.prompt_set.SeveralSets`, of records that a test writes down."""

    def find(self, names: Iterable[str]) -> dict[str, PromptRecord]:
        """See `Prompts.find`."""
        wanted = set(names)
        return {record.prompt_id: record for record in self if record.prompt_id in wanted}

    @property
    def fingerprint(self) -> str:
        """Of what the records hold."""
        return f"{hash(tuple(repr(record) for record in self)) & (2**64 - 1):016x}"
