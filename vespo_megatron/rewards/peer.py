"""One end of a conversation between a program and its tests, each in a process of its own: values go over, never code.

A value arrives as what it is only if it is plain: numbers, texts, bytes, and lists, tuples, sets and dicts of them.
Anything else stays where it is and is a `Remote` for the other side, equal to nothing but itself. So no object of a
program can say of itself that it equals what a test expects.

This file is the first part of what runs behind the wall: standard library alone, and no import of this package.
"""

from __future__ import annotations

import builtins
import json
import socket
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

_FORWARDED = (
    *("__len__", "__getitem__", "__setitem__", "__delitem__", "__iter__", "__next__", "__str__", "__repr__"),
    *("__enter__", "__exit__", "__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__"),
    *("__floordiv__", "__mod__", "__pow__", "__neg__"),
)
"""What Python looks for in an object's type; comparisons (`in` is one) are not among them."""
_NUMBERS = {"fraction": Fraction, "decimal": Decimal, "complex": complex}


class Remote:
    """An object of the other side: called, asked for attributes and items, and never compared."""

    def __init__(self, peer: Peer, number: int) -> None:
        self.__dict__.update(_peer=peer, _number=number)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._peer.ask("call", self._number, arguments, named)

    def __getattr__(self, name: str) -> Any:
        return self._peer.ask("attribute", self._number, (name,), {})

    def __bool__(self) -> bool:
        for name in ("__bool__", "__len__"):
            try:
                return bool(self.__getattr__(name)())
            except AttributeError:
                continue
        return True


def _forward(name: str) -> Callable:
    def method(self: Remote, *arguments: Any) -> Any:
        try:
            there = self.__getattr__(name)
        except AttributeError:
            raise TypeError(f"the program's object has no {name}") from None
        return there(*arguments)

    return method


for _name in _FORWARDED:
    setattr(Remote, _name, _forward(_name))


class Peer:
    """Asks the other side and answers it, over a socket, one JSON text a line.

    Args:
        channel: its file descriptor.
        names: what the other side may ask for by name; None: it may only call what it has been given.
    """

    def __init__(self, channel: int, names: Mapping[str, Any] | None = None) -> None:
        sys.set_int_max_str_digits(0)  # numbers of any length go over
        self._stream = socket.socket(fileno=channel).makefile("rwb")
        self._names, self._objects = names, []  # type: ignore[var-annotated]

    def ask(self, what: str, number: int, arguments: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """What the other side answers; raises what it says was raised there, and EOFError when it is gone."""
        self._send([what, number, self._encode(list(arguments)), self._encode(dict(named))])
        while True:
            message = self._receive()
            if message[0] == "raised":
                raise _exception(*message[1:])
            if message[0] == "value":
                for mine, theirs in zip(arguments, self._decode(message[2]), strict=True):
                    _change(mine, theirs)
                return self._decode(message[1])
            self._answer(*message)

    def serve(self) -> None:
        """Answer until the other side is gone."""
        while True:
            try:
                self._answer(*self._receive())
            except EOFError:
                return

    def _answer(self, what: str, number: int, arguments: Any, named: Any) -> None:
        try:
            given, keywords = self._decode(arguments), self._decode(named)
            value = self._do(what, number, given, keywords)
            message = ["value", self._encode(value), self._encode(given)]
        except Exception as error:
            message = ["raised", type(error).__name__, str(error)]
        self._send(message)

    def _do(self, what: str, number: int, arguments: list, named: dict) -> Any:
        if what == "call":
            return self._objects[number](*arguments, **named)
        if self._names is None:
            raise PermissionError(what)
        if what == "names":
            return {name: _module_name(self._names[name]) for name in arguments if name in self._names}
        if what == "name":
            return self._names[arguments[0]]
        return getattr(self._objects[number], arguments[0])

    def _send(self, message: list) -> None:
        self._stream.write(json.dumps(message).encode() + b"\n")
        self._stream.flush()

    def _receive(self) -> list:
        line = self._stream.readline()
        if not line.endswith(b"\n"):
            raise EOFError("the other side is gone")
        return json.loads(line)

    def _encode(self, value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, list):
            return [self._encode(item) for item in value]
        if isinstance(value, tuple):
            return {"tuple": [self._encode(item) for item in value]}
        if isinstance(value, (set, frozenset)):
            return {type(value).__name__: [self._encode(item) for item in value]}
        if isinstance(value, dict):
            return {"dict": [[self._encode(key), self._encode(item)] for key, item in value.items()]}
        if isinstance(value, (bytes, bytearray)):
            return {"bytes": value.hex()}
        for name, kind in _NUMBERS.items():
            if isinstance(value, kind):
                return {name: str(value)}
        if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
            return self._encode(value.tolist())
        if isinstance(value, Remote):
            return {"yours": value._number}
        self._objects.append(value)
        return {"mine": len(self._objects) - 1}

    def _decode(self, data: Any) -> Any:
        if isinstance(data, list):
            return [self._decode(item) for item in data]
        if not isinstance(data, dict):
            return data
        ((kind, content),) = data.items()
        if kind == "mine":
            return Remote(self, int(content))
        if kind == "yours":
            return self._objects[content]
        if kind == "bytes":
            return bytes.fromhex(content)
        if kind in _NUMBERS:
            return _NUMBERS[kind](content)
        parts = self._decode(content)
        return {"tuple": tuple, "set": set, "frozenset": frozenset, "dict": dict}[kind](parts)


def _change(mine: Any, theirs: Any) -> None:
    """An argument as the call has left it, where it can be changed."""
    if mine is theirs or type(mine) is not type(theirs):
        return
    if isinstance(mine, list) and mine != theirs:
        mine[:] = theirs
    elif isinstance(mine, (dict, set)) and mine != theirs:
        mine.clear()
        mine.update(theirs)


def _module_name(value: Any) -> str | None:
    return value.__name__ if isinstance(value, types.ModuleType) else None


def _exception(name: str, text: str) -> Exception:
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(text)
        except TypeError:  # UnicodeDecodeError and its like want more
            pass
    return RuntimeError(f"{name}: {text}")


def names_used(code: types.CodeType) -> Iterator[str]:
    """Every global name that compiled code may look up."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from names_used(constant)
