"""Registry of objectives: name → φ and what each one needs. A new objective is one function in `objectives.py`.

A φ takes one `Ratios` (everything it may look at, detached) and keyword-only hyperparameters, and returns the
coefficient of A·∇log π: `[num_sequences]` for a sequence objective, `[tokens]` for a token objective.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from vespo_megatron.errors import UserError

LEVELS = ("sequence", "token")
Phi = Callable[..., Tensor]


@dataclass(frozen=True)
class Objective:
    """One row of the family."""

    name: str
    phi: Phi
    level: str
    """sequence: φ is [num_sequences]; token: φ is [tokens]."""
    aggregation: str
    """What its paper uses; the recipe decides."""
    source: str
    anchor: str = "auto"
    """auto: π_old in behaviour mode recompute, μ in rollout; behavior: always μ; old: needs π_old."""
    correction_apply: str = "after_clip"
    """Where a train-inference correction enters unless told otherwise."""
    corrections: str = ""
    """Why a correction's weight is refused; empty: it is not."""
    uses_ratio: bool = True
    """Whether φ has the ratio in it: then it corrects what the ratio is against, and a weight of the same ratio would
    count it twice."""
    is_users_own: bool = False
    """Whether it is no objective of this library."""

    @cached_property
    def hyperparameters(self) -> dict[str, Any]:
        """Name → default of each hyperparameter."""
        parameters = inspect.signature(self.phi).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}

    def check(self, hyperparameters: Iterable[str], where: str = "loss_fn.hyperparameters") -> None:
        """Raise UserError for a hyperparameter this objective does not have, naming the nearest it has."""
        accepts_any = any(
            p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(self.phi).parameters.values()
        )
        for name in hyperparameters:
            if name not in self.hyperparameters and not accepts_any:
                raise unknown("hyperparameter", name, self.hyperparameters, where=f"{where} of {self.name}")


_OBJECTIVES: dict[str, Objective] = {}


def objective(name: str, *, level: str, aggregation: str, source: str, **details: Any) -> Callable[[Phi], Phi]:
    """Decorator: register a φ under `name`."""

    def register(phi: Phi) -> Phi:
        _OBJECTIVES[name] = Objective(name, phi, level, aggregation, source, **details)
        return phi

    return register


def objective_names() -> list[str]:
    """Every registered objective, in the order of docs/losses.md."""
    return list(_OBJECTIVES)


def get_objective(name: str) -> Objective:
    """The objective called `name`, or the user's own as `package.module:function`.

    A function of the user's may carry the attributes `level` ("sequence" or "token", default "token") and
    `aggregation`.

    Raises:
        UserError: unknown name (the nearest is named), a module that does not import, something not callable.
    """
    if name in _OBJECTIVES:
        return _OBJECTIVES[name]
    if ":" not in name:
        raise unknown("objective", name, _OBJECTIVES, where="loss_fn.name")
    module_name, _, function_name = name.partition(":")
    try:
        phi = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"cannot load {name!r}: {error}", where="loss_fn.name", expected="package.module:function"
        ) from error
    level = getattr(phi, "level", "token")
    if not callable(phi) or level not in LEVELS:
        raise UserError(
            f"{name!r} is no objective (callable: {callable(phi)}, level: {level!r})",
            where="loss_fn.name",
            expected=f"a function φ(ratios, *, …) whose attribute level is one of {LEVELS}",
        )
    return Objective(
        name,
        phi,
        level,
        getattr(phi, "aggregation", "token-mean"),
        "the user's own",
        uses_ratio=getattr(phi, "uses_ratio", True),
        is_users_own=True,
    )


def unknown(kind: str, name: str, known: Iterable[str], *, where: str) -> UserError:
    """The error for a name that is not known: says the nearest and lists all."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return UserError(
        f"unknown {kind} {name!r}" + (f"; the nearest is {near[0]!r}" if near else ""),
        where=where,
        expected="one of " + ", ".join(known) if known else f"no {kind}",
    )
