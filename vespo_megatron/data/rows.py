"""A row in veRL's schema as what it asks and is scored by; columns of other names, constants and filters.

The schema (https://verl.readthedocs.io/en/latest/preparation/prepare_data.html): `prompt` (chat messages or text),
`data_source`, `reward_model.ground_truth`, optionally `extra_info`; beside it `tools` (as chat templates take them).
"""

from __future__ import annotations

import contextlib
import json
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vespo_megatron.errors import UserError

_LIKE_MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"](?:role|content)['"]\s*:""")
COLUMNS = ("prompt", "data_source", "reward_model", "ground_truth", "extra_info", "tools")
"""What a set's `columns` may name. `ground_truth` stands for `reward_model: {ground_truth: …}`."""

Messages = list[dict[str, Any]]


class Columns:
    """Where a set has what.

    Args:
        given: column of the schema → the set's own, or `=constant`.
        prompt_key: of the prompt, where `given` says nothing of it.

    Raises:
        UserError: `given` names what the schema does not have.
    """

    def __init__(self, given: Mapping[str, str], prompt_key: str, where: str) -> None:
        if unknown := sorted(set(given) - set(COLUMNS)):
            raise UserError(f"has {unknown[0]!r}", where=f"{where}: columns", expected=f"some of {', '.join(COLUMNS)}")
        names = {"prompt": prompt_key} | dict(given)
        self._constants = {name: text[1:] for name, text in names.items() if text.startswith("=")}
        self._names = {name: names.get(name, name) for name in COLUMNS if name not in self._constants}
        self.names = names
        """Of the columns that have another name than the schema's, or a constant; and of the prompt's."""

    def check(self, there: Sequence[str], where: str) -> None:
        """Raises `UserError` where a column that every row needs is not `there`."""
        needed = ["prompt", "data_source"]
        if "ground_truth" not in self._constants and self._names["ground_truth"] not in there:
            needed.append("reward_model")
        for column in needed:
            name = self._names.get(column)
            if name is not None and name not in there:
                fix = "rename the column, or name it in the set's columns"
                raise UserError(
                    f"has no column {name!r}",
                    where=where,
                    expected=f"veRL's schema; found {list(there)}",
                    fix=fix + (", or set data.prompt_key" if column == "prompt" else ""),
                )

    def of(self, row: Mapping[str, Any], column: str) -> Any:
        """What a row has there, None where it has nothing."""
        if column in self._constants:
            return self._constants[column]
        return row.get(self._names[column])

    def used(self, there: Sequence[str]) -> list[str]:
        """Of the columns `there`, those that are read."""
        return [name for name in there if name in self._names.values()]


def ground_truth(columns: Columns, row: Mapping[str, Any]) -> Any:
    """What a response is scored by. Raises `UserError`."""
    alone = columns.of(row, "ground_truth")
    if alone is not None:
        return alone
    reward_model = mapping(columns.of(row, "reward_model"), "reward_model")
    if "ground_truth" not in reward_model:
        raise UserError(f"reward_model is {reward_model!r}", expected="a mapping with ground_truth")
    return reward_model["ground_truth"]


def mapping(value: Any, column: str) -> dict[str, Any]:
    """A column that holds a mapping, or JSON of one; empty where it holds nothing. Raises `UserError`."""
    found = value or {}
    if isinstance(found, str):
        with contextlib.suppress(json.JSONDecodeError):
            found = json.loads(found)
    if not isinstance(found, dict):
        raise UserError(f"{column} is {value!r}", expected="a mapping, or JSON of one")
    return found


def tools(value: Any) -> list[dict[str, Any]] | None:
    """Tools that a template is told of: a list of mappings, or JSON of one. Raises `UserError`."""
    if isinstance(value, str):
        with contextlib.suppress(json.JSONDecodeError):
            value = json.loads(value)
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise UserError(f"tools is {value!r}", expected="a list of tools as mappings, or JSON of one")
    return [_without_nothing(each) for each in value]


def prompt(value: Any, system: str | None = None) -> str | Messages:
    """A text, or messages of {role, content: text, …}.

    Messages may be JSON in a text, as parquet written by pandas often has them; the parts of a content are joined. What
    Arrow fills in where a row has nothing (None) is taken out again.

    Args:
        system: what goes before messages that have no system message.

    Raises:
        UserError: it is neither, or a part of it is no text.
    """
    if isinstance(value, str) and _LIKE_MESSAGES.match(value):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise UserError(
                f"the prompt {value[:40]!r} looks like messages and is no JSON",
                expected="text, a list of {role, content}, or JSON of one",
                fix="write the column with json.dumps, not with str",
            ) from None
    if isinstance(value, str):
        return value
    if not isinstance(value, Sequence) or not value or not all(isinstance(each, dict) for each in value):
        raise UserError(f"the prompt is {value!r}", expected="text, or a list of {role, content}")
    messages = [_message(each) for each in value]
    if system and not any(message.get("role") == "system" for message in messages):
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _message(message: dict[str, Any]) -> dict[str, Any]:
    kept = {name: _without_nothing(value) for name, value in message.items() if value is not None}
    content = kept.get("content")
    if isinstance(content, list):
        kept["content"] = "".join(_text_of(part) for part in content)
    elif content is None and kept.get("tool_calls"):
        kept["content"] = ""  # a turn that calls a tool and says nothing
    elif not isinstance(content, str):
        raise UserError(f"a message is {message!r}", expected="text, or parts of text, as every message's content")
    return kept


def _text_of(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else part
    raise UserError(f"a message has a part {kind!r}", expected="parts of type text: other kinds are not trained on")


def _without_nothing(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nothing(each) for name, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_without_nothing(each) for each in value]
    return value


def too_long(tokens: int, limit: int, where: str) -> UserError:
    """The error of a prompt of more than `limit` tokens."""
    return UserError(
        f"the prompt has {tokens} tokens",
        where=where,
        expected=f"at most {limit}, data.max_input_seq_length",
        fix="raise the limit (and policy.max_total_sequence_length), or set data.on_long_prompt=drop",
    )


# ---- filters ---------------------------------------------------------------------------------------------------------

_FILTER = re.compile(r"\s*([\w.]+)\s*(==|!=|<=|>=|<|>|not in|in|~)\s*(.*?)\s*")
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(frozen=True)
class Filter:
    """`column op value`: of the set's own columns, entries of mappings as in `extra_info.level`.

    Operators: == != < <= > >= (as numbers where both are), `in` and `not in` (choices apart by |), `~` (a regular
    expression is found in it). A row that has nothing there is not taken, but by != and `not in`.
    """

    column: str
    op: str
    value: str

    @staticmethod
    def of(text: str, where: str) -> Filter:
        """Raises `UserError` where it is none."""
        found = _FILTER.fullmatch(text)
        if found is None:
            raise UserError(
                f"has {text!r}", where=where, expected="column op value, as in level >= 3; op one of == != < > in ~ …"
            )
        column, op, value = found.groups()
        if op == "~":
            try:
                re.compile(value)
            except re.error as error:
                raise UserError(f"{value!r} is no regular expression ({error})", where=where) from None
        return Filter(column, op, value.strip("'\""))

    def takes(self, row: Mapping[str, Any]) -> bool:
        """Whether the row is one of those that are wanted. Raises `KeyError` where there is no such column."""
        first, *inside = self.column.split(".")
        value: Any = row[first]
        for name in inside:
            value = mapping(value, first).get(name)
        if value is None:
            return self.op in ("!=", "not in")
        if self.op == "~":
            return re.search(self.value, str(value)) is not None
        if self.op in ("in", "not in"):
            return (str(value) in self.value.split("|")) == (self.op == "in")
        with contextlib.suppress(ValueError, TypeError):
            return _COMPARE[self.op](float(value), float(self.value))
        return _COMPARE[self.op](str(value), self.value)
