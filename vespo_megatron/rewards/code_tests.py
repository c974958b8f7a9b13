"""A problem's tests, read from its ground truth in any of the forms that public sets have them in.

| form | sets |
|---|---|
| `{"inputs", "outputs"}`: what is read and printed; with `"fn_name"`, arguments and result | APPS, TACO, Eurus |
| the same with arguments as lines of JSON, `"1\\n2"`, and the result as JSON | Eurus, LiveCodeBench |
| a list of `{"input", "output"}`, with `"metadata": {"func_name"}` for functions | LiveCodeBench |
| `{"asserts"}` or a list of Python statements, one test each | MBPP |
| `{"test"}` or a text that is no JSON: Python statements, one test together | HumanEval+, MBPP+ |
| `{"packed"}`: JSON of any of these, by zlib and base64 | sets with megabytes of tests a problem |
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vespo_megatron.errors import UserError
from vespo_megatron.rewards.code_judges import Judge

_LARGEST = 1 << 30
"""Bytes of one problem's tests, unpacked."""


@dataclass(frozen=True)
class Prints:
    """A program that is given a text on standard input must print another."""

    given: str
    wanted: str

    def accepts(self, printed: str, judge: Judge) -> bool:
        """Whether that is what it must print."""
        return judge.same_output(printed, self.wanted)


@dataclass(frozen=True)
class Calls:
    """A function, or method of `Solution`, must return one of several values."""

    name: str
    arguments: Sequence[Any]
    wanted: Sequence[Any]
    as_text: Sequence[str] = ()
    """The line of JSON that stands for what is wanted."""
    wrapped: Sequence[Any] = ()
    """What that line has in a list of one."""

    def accepts(self, value: Any, judge: Judge) -> bool:
        """Whether `value`, as JSON has it, is one of them."""
        accepted = [*self.wanted]
        accepted += self.as_text if judge.takes_text else ()
        accepted += self.wrapped if judge.unwraps else ()
        return any(judge.same_value(value, one) for one in accepted)


@dataclass(frozen=True)
class Holds:
    """Python statements must run to their end behind the program."""

    statements: str


CodeTest = Prints | Calls | Holds


def read_tests(ground_truth: Any, where: str = "ground truth") -> list[CodeTest]:
    """The tests of a ground truth: an object, or JSON of it.

    Raises:
        UserError: of no known form, or inputs and outputs of different number.
    """
    tests = _decoded(ground_truth)
    if isinstance(tests, Mapping) and isinstance(tests.get("packed"), str):
        tests = _decoded(_unpacked(tests["packed"], where))
    if isinstance(tests, str):
        tests = {"test": tests}
    if isinstance(tests, list) and tests and all(isinstance(one, Mapping) for one in tests):
        return [_pair(_function(one), one.get("input"), one.get("output"), where) for one in tests]
    if isinstance(tests, list) and all(isinstance(one, str) for one in tests):
        tests = {"asserts": tests}
    if isinstance(tests, Mapping):
        inputs, outputs = tests.get("inputs"), tests.get("outputs")
        if isinstance(inputs, list) and isinstance(outputs, list):
            if len(inputs) != len(outputs):
                raise UserError(f"{len(inputs)} inputs have {len(outputs)} outputs", where=where, expected="as many")
            return [_pair(_function(tests), *pair, where) for pair in zip(inputs, outputs, strict=True)]
        if isinstance(tests.get("asserts"), list):
            return [Holds(str(line)) for line in tests["asserts"]]
        if isinstance(tests.get("test"), str):
            return [Holds(tests["test"])] if tests["test"].strip() else []
    raise UserError(
        f"{str(ground_truth)[:60]!r} are no tests",
        where=where,
        expected='{"inputs", "outputs"}, with "fn_name" for functions, {"asserts"}, {"test"} or a list of statements',
    )


def unreadable(ground_truth: Any) -> str | None:
    """Why no program could ever pass; None where one can."""
    try:
        return None if read_tests(ground_truth) else "holds no tests"
    except UserError as error:
        return error.what


def _function(tests: Mapping[str, Any]) -> str | None:
    metadata = _decoded(tests.get("metadata"))
    named = metadata.get("func_name") if isinstance(metadata, Mapping) else None
    return tests.get("fn_name") or named


def _pair(function: str | None, given: Any, wanted: Any, where: str) -> CodeTest:
    if given is None or wanted is None:
        raise UserError("a test lacks its input or its output", where=where, expected="both")
    if function is None:
        return Prints(_text(given), _text(wanted))
    if isinstance(given, str):
        arguments = [_whole_keys(_decoded(line)) for line in given.splitlines() if line.strip()]
        value = _decoded(wanted)
        return Calls(function, arguments, [value], [wanted] if isinstance(wanted, str) else [], _alone(value))
    arguments = [_whole_keys(argument) for argument in (given if isinstance(given, list) else [given])]
    return Calls(function, arguments, [wanted, *_alone(wanted)])


def _alone(value: Any) -> list[Any]:
    return value if isinstance(value, list) and len(value) == 1 else []


def _whole_keys(argument: Any) -> Any:
    """A dict's keys as numbers where all are: JSON has made texts of them."""
    if isinstance(argument, Mapping) and argument and all(str(key).lstrip("-").isdecimal() for key in argument):
        return {int(key): value for key, value in argument.items()}
    return argument


def _decoded(text: Any) -> Any:
    if isinstance(text, str):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text


def _unpacked(text: str, where: str) -> str:
    try:
        unpacking = zlib.decompressobj()
        found = unpacking.decompress(base64.b64decode(text, validate=True), _LARGEST)
        if not unpacking.eof:
            raise ValueError("it is cut off, or larger than a GiB")
        return found.decode()
    except (ValueError, zlib.error) as error:
        raise UserError(f"packed tests cannot be unpacked ({error})", where=where) from None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "\n".join(map(_text, value)) if isinstance(value, list) else str(value)
