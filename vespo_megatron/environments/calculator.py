"""A calculator: whatever a turn puts into a call is reckoned, and the number is what the policy reads next."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping

from vespo_megatron.data.prompt_set import PromptRecord
from vespo_megatron.environments.protocol import Step, Turn

_BINARY: Mapping[type[ast.operator], Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_LONGEST, _DIGITS = 1000, 100
"""Characters of an expression, and digits of a whole number on the way: nothing of it takes long."""


class Calculator:
    """Answers the last call of a turn; a turn without one ends the episode.

    Args:
        opens, closes: what stands around an expression. Where `closes` is empty it goes on to the end of the turn.
        role: of the message that holds the number.
    """

    def __init__(self, *, opens: str = "<calculator>", closes: str = "</calculator>", role: str = "tool") -> None:
        self.opens, self.closes, self.role = opens, closes, role

    def reset(self, record: PromptRecord) -> None:
        """The record's prompt."""

    def step(self, turn: Turn) -> Step:
        """See `Environment.step`. What cannot be reckoned is answered with `error`, and counted."""
        _, called, rest = turn.text.rpartition(self.opens)
        expression, closed, _ = rest.partition(self.closes) if self.closes else (rest, "end", "")
        if not called or not closed:
            return Step("", done=True)
        try:
            answer, failed = reckon(expression), 0
        except (ValueError, ArithmeticError, SyntaxError, RecursionError, MemoryError):
            answer, failed = "error", 1
        return Step([{"role": self.role, "content": answer}], tool_errors=failed)


def reckon(expression: str) -> str:
    """The number that an expression of numbers, + - * / // % and parentheses makes; whole ones without a point.

    Raises:
        ValueError: too long, too large, or something else in it.
        ArithmeticError: a division by 0.
        SyntaxError: it is no expression.
    """
    if len(expression) > _LONGEST:
        raise ValueError("is too long")
    value = _value(ast.parse(expression.strip(), mode="eval").body)
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    return str(value)


def _value(node: ast.expr) -> int | float:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        return _bounded(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _bounded(_BINARY[type(node.op)](_value(node.left), _value(node.right)))
    raise ValueError("is no arithmetic")


def _bounded(value: int | float) -> int | float:
    if isinstance(value, int) and abs(value) >= 10**_DIGITS:
        raise ValueError("is too large")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("is no finite number")
    return value
