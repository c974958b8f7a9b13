"""A response's program: the block it stands in, and the imports that every harness brings along."""

from __future__ import annotations

import ast
import builtins
import importlib
import re
import textwrap
from functools import cache

_OPENS = re.compile(r"(`{3,}|~{3,})[ \t]*(?:\{?\.?([A-Za-z][\w+#-]*)[^\n`]*)?\r?\n")
_PYTHON = re.compile(r"(?:python|py)[\d.]*", re.IGNORECASE)
_NO_MAIN = "import sys as _sys; __name__ = 'program'; _sys.modules[__name__] = _sys.modules['__main__']"
_MODULES = (
    *("collections", "typing", "math", "heapq", "bisect", "itertools", "functools", "string", "re", "random"),
    *("operator", "copy", "datetime", "statistics", "json", "io", "sys"),
)
"""What LiveCodeBench's and veRL's harnesses import whole before a program; of a name that two have, the first one's."""


def last_program(text: str) -> str | None:
    """The last complete block of Python, or without one the last without a language; None without either."""
    named: list[str] = []
    plain: list[str] = []
    position = 0
    while opens := _OPENS.search(text, position):
        fence = re.escape(opens[1])
        closes = re.compile(rf"^[ \t]*{fence}|{fence}[ \t]*\r?$", re.MULTILINE).search(text, opens.end())
        if closes is None:
            break
        program = textwrap.dedent(text[opens.end() : closes.start()])
        if opens[2] is None:
            plain.append(program)
        elif _PYTHON.fullmatch(opens[2]):
            named.append(program)
        position = closes.end()
    blocks = named or plain
    return blocks[-1] if blocks else None


def prepare(program: str, *, as_main: bool, recursion_limit: int | None = None) -> str:
    """The program behind imports of what it uses of `_MODULES` without having imported it.

    Only names that it binds nowhere are imported, so that none of its own is hidden. What is no Python stays as it is.

    Args:
        as_main: whether it runs as a script; else what it does under `__name__ == "__main__"` is left out.
        recursion_limit: Python's while it runs; None leaves it.
    """
    try:
        tree = ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return program
    head = [] if as_main else [_NO_MAIN]
    head += [f"import sys as _sys; _sys.setrecursionlimit({recursion_limit})"] if recursion_limit else []
    head += filter(None, (_import(name, called=name in _called(tree)) for name in sorted(_missing(tree))))
    lines = program.splitlines()
    after = max((node.end_lineno or 0 for node in tree.body if _is_future(node)), default=0)
    return "\n".join([*lines[:after], *head, *lines[after:], ""])


def _missing(tree: ast.Module) -> set[str]:
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return used - _bound(tree) - set(dir(builtins))


def _called(tree: ast.Module) -> set[str]:
    return {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}


def _is_future(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def _bound(tree: ast.Module) -> set[str]:
    """Every name that any scope of it gives a value."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
            names.add(node.name)
    return names


def _import(name: str, *, called: bool) -> str:
    """A statement that brings a name along; empty where no module has it. A module's own name is the module."""
    if name in _MODULES and not (called and _homes().get(name) == name):
        return f"import {name}"
    home = _homes().get(name)
    return f"from {home} import {name}" if home else ""


@cache
def _homes() -> dict[str, str]:
    """Public name → the first module of `_MODULES` that has it."""
    homes: dict[str, str] = {}
    for module in _MODULES:
        loaded = importlib.import_module(module)
        for name in getattr(loaded, "__all__", None) or [name for name in dir(loaded) if name[0] != "_"]:
            homes.setdefault(name, module)
    return homes
