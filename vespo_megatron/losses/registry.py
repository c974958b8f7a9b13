"""Registry of objectives: name → φ and what each one needs. A new objective is one function in `objectives/`.

A φ takes one `Ratios` (everything it may look at, detached) and keyword-only hyperparameters, and returns the
coefficient of A·∇log π: `[num_sequences]` for a sequence objective, `[tokens]` for a token objective.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vespo_megatron.errors import UserError
from vespo_megatron.losses.lazy import lazy

if TYPE_CHECKING:
    from vespo_megatron.losses.ratios import Ratios
    from vespo_megatron.losses.search import Search

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
    search: type[Search] | None = None
    """How what it has to know of a whole mini-batch is searched for before the first token; None: nothing."""
    is_users_own: bool = False
    """Whether φ is no function of this library: it may give numbers that are not finite on one rank alone."""

    @lazy
    def hyperparameters(self) -> dict[str, Any]:
        """Name → default of each hyperparameter."""
        parameters = inspect.signature(self.phi).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}

    def check(self, hyperparameters: Iterable[str], where: str = "loss_fn.hyperparameters") -> None:
        """Check the names of the hyperparameters that are given.

        Raises:
            UserError: one that this objective does not have (the nearest it has is named), or lacks a value for.
        """
        given = list(hyperparameters)
        accepts_any = any(
            p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(self.phi).parameters.values()
        )
        for name in given:
            if name not in self.hyperparameters and not accepts_any:
                raise unknown("hyperparameter", name, self.hyperparameters, where=f"{where} of {self.name}")
        for name, default in self.hyperparameters.items():
            if default is inspect.Parameter.empty and name not in given:
                raise UserError(f"{name} is missing", where=f"{where} of {self.name}", expected="a value: no default")

    def __call__(self, ratios: Ratios, **hyperparameters: Any) -> Tensor:
        """φ of a micro-batch: [num_sequences] or [tokens], as `level` says.

        Raises:
            UserError: what φ returned is none.
        """
        phi = self.phi(ratios, **hyperparameters)
        expected = ratios.lengths.shape if self.level == "sequence" else ratios.log_probs.shape
        if isinstance(phi, Tensor) and phi.shape == expected and phi.is_floating_point():
            return phi
        found = f"{phi.dtype} {list(phi.shape)}" if isinstance(phi, Tensor) else f"a {type(phi).__name__}"
        size = "num_sequences" if self.level == "sequence" else "tokens"
        other = "token" if self.level == "sequence" else "sequence"
        raise UserError(
            f"φ returned {found}",
            where=f"objective {self.name}",
            expected=f"[{size}] = {list(expected)}, floating point: its level is {self.level!r}",
            fix=f'set level = "{other}" on it where it gives one number per {other}',
        )


_OBJECTIVES: dict[str, Objective] = {}


def objective(name: str, *, level: str, aggregation: str, source: str, **details: Any) -> Callable[[Phi], Phi]:
    """Decorator: register a φ under `name`.

    Raises:
        UserError: a name that is taken, a level that is none, a function that cannot be called as a φ.
    """

    def register(phi: Phi) -> Phi:
        if name in _OBJECTIVES:
            raise UserError(
                f"is registered already, from {_OBJECTIVES[name].source}",
                where=f"objective {name!r}",
                expected="a name that is not taken",
                fix="choose another, or give the function itself as the loss's name",
            )
        of_this_library = getattr(phi, "__module__", "").startswith("vespo_megatron.losses.")
        made = Objective(name, phi, level, aggregation, source, is_users_own=not of_this_library, **details)
        _check_phi(made)
        _OBJECTIVES[name] = made
        return phi

    return register


def objective_names() -> list[str]:
    """Every registered objective, in the order of docs/losses.md."""
    return list(_OBJECTIVES)


def get_objective(name: str | Phi) -> Objective:
    """The objective called `name`, or the user's own: a function, or `package.module:function`.

    A function of the user's may carry the attributes `level` ("sequence" or "token", default "token"), `aggregation`
    and `uses_ratio`.

    Raises:
        UserError: unknown name (the nearest is named), a module that does not import, something that is no φ.
    """
    if not isinstance(name, str):
        registered = (known for known in _OBJECTIVES.values() if known.phi is name)
        return next(registered, None) or _users_own(getattr(name, "__qualname__", repr(name)), name)
    if name in _OBJECTIVES:
        return _OBJECTIVES[name]
    if ":" not in name:
        raise unknown("objective", name, _OBJECTIVES, where="loss_fn.name")
    module_name, _, function_name = name.partition(":")
    try:
        phi = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:  # ValueError: an empty module name
        raise UserError(
            f"cannot load {name!r}: {error}", where="loss_fn.name", expected="package.module:function"
        ) from error
    return _users_own(name, phi)


def _users_own(name: str, phi: Any) -> Objective:
    """The row of a φ that is not registered, from its attributes."""
    if not callable(phi):
        raise UserError(
            f"{name!r} is no objective but a {type(phi).__name__}",
            where="loss_fn.name",
            expected="a registered name, package.module:function, or a function φ(ratios, *, …)",
        )
    made = Objective(
        name,
        phi,
        getattr(phi, "level", "token"),
        getattr(phi, "aggregation", "token-mean"),
        "the user's own",
        uses_ratio=getattr(phi, "uses_ratio", True),
        is_users_own=True,
    )
    _check_phi(made)
    return made


def _check_phi(made: Objective) -> None:
    """Raise UserError for a level that is none, or a function that one `Ratios` and keywords do not call."""
    if made.level not in LEVELS:
        raise unknown("level", str(made.level), LEVELS, where=f"objective {made.name}")
    try:
        signature = inspect.signature(made.phi)
        signature.bind(None, **dict.fromkeys(made.hyperparameters))
    except (TypeError, ValueError) as error:  # ValueError: a function of C, which does not say what it takes
        raise UserError(
            f"cannot be called as φ(ratios): {error}",
            where=f"objective {made.name}",
            expected="a function of one positional argument, a Ratios, and hyperparameters that are keyword-only",
            fix="def phi(ratios, *, epsilon: float = 0.2) -> Tensor",
        ) from error


def unknown(kind: str, name: str, known: Iterable[str], *, where: str) -> UserError:
    """The error for a name that is not known: says the nearest and lists all."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return UserError(
        f"unknown {kind} {name!r}" + (f"; the nearest is {near[0]!r}" if near else ""),
        where=where,
        expected="one of " + ", ".join(known) if known else f"no {kind}",
    )
