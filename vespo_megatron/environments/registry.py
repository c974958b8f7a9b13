"""Which environments there are: built-in ones by name, anybody's own as `package.module:Class`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from vespo_megatron.environments.protocol import Environment
from vespo_megatron.errors import UserError
from vespo_megatron.recipe.schema import EnvConfig
from vespo_megatron.rewards.code import choose_wall

BUILT_IN = {
    "calculator": "vespo_megatron.environments.calculator:Calculator",
    "python": "vespo_megatron.environments.python_tool:PythonTool",
}


def find(name: str) -> Callable[..., Environment]:
    """The class. Raises `UserError` where there is none such."""
    module, _, attribute = BUILT_IN.get(name, name).partition(":")
    known = f"{', '.join(BUILT_IN)}, or package.module:Environment"
    if not attribute:
        raise UserError(f"is {name!r}", where="env.class", expected=known)
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{name!r} cannot be imported ({error})", where="env.class", expected=known) from None
    missing = [method for method in ("reset", "step") if not callable(getattr(found, method, None))]
    if missing:
        raise UserError(f"{name!r} has no {' and no '.join(missing)}", where="env.class", expected="both methods")
    return found


def check(env: EnvConfig) -> str | None:
    """What is known before one is made. Returns what programs are fenced by, where it runs any.

    Raises:
        UserError: there is no such class, it does not take `env.options`, or nothing here fences programs.
    """
    if env.environment is None:
        return None
    found = find(env.environment)
    try:
        inspect.signature(found).bind(**env.options)
    except TypeError as error:
        raise UserError(
            f"do not fit ({error})", where="env.options", expected=f"arguments of {env.environment}"
        ) from None
    if env.environment != "python":
        return None
    return choose_wall(allow_unsafe_code=bool(env.options.get("allow_unsafe_code", False))).description


def make(name: str, options: dict[str, Any]) -> Environment:
    """One environment."""
    return find(name)(**options)
