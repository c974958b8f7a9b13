"""The table of objectives: name → φ, with what each one needs; a new objective is one function and one line here.

A φ takes one `Ratios` (everything it may look at, detached) and keyword-only hyperparameters, and returns the
coefficient of A·∇log π: `[num_sequences]` for a sequence objective, `[tokens]` for a token objective.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from vespo_megatron.errors import UserError
from vespo_megatron.losses.sequence import PackedSequences

LEVELS = ("sequence", "token")
LOG_RATIO_CLAMP = 20.0
"""Bound of one token's log-ratio, and of log W where a metric exponentiates it."""


@dataclass(frozen=True)
class Ratios:
    """What an objective may look at; every tensor is detached, in float32 or float64.

    "Anchor" is the policy the ratio is taken against: μ (behaviour `rollout`) or π_old (behaviour `recompute`), unless
    the objective asks for one of them by name. Log-ratios are clamped to ±20 per token, and 0 where masked.
    """

    sequences: PackedSequences
    mask: Tensor | None
    """bool [tokens]; None: every token counts."""
    sequence_log_ratio: Tensor
    """[num_sequences]: S, its sum over the whole response (every context parallel rank)."""
    lengths: Tensor
    """[num_sequences]: T, tokens in that sum, over every context parallel rank."""
    advantage: Tensor
    """[num_sequences] or [tokens], as given."""
    sequence_advantage: Tensor
    """[num_sequences]: the mean over unmasked tokens where advantages came per token."""
    per_token_advantage: bool
    log_probs: Tensor
    """[tokens]: log π_θ."""
    behavior_log_probs: Tensor
    """[tokens]: log μ."""
    old_log_probs: Tensor | None = None
    """[tokens]: log π_old; None in behaviour mode `rollout`."""
    positions: Tensor | None = None
    """int64 [tokens]: index of each token in its whole response; None: as packed here."""
    corrected_log_ratio: Tensor | None = None
    """[tokens]: the log-ratio with a correction's log-weight applied before the clip; None: without one."""

    @cached_property
    def log_ratio(self) -> Tensor:
        """[tokens]: log π_θ − log π_anchor, made only for objectives that look at tokens."""
        if self.corrected_log_ratio is not None:
            return self.corrected_log_ratio
        difference = self.masked(self.log_probs - self.anchor_log_probs)
        return difference.clamp_(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)

    @cached_property
    def token_advantage(self) -> Tensor:
        """[tokens]"""
        return self.advantage if self.per_token_advantage else self.sequences.expand(self.advantage)

    @property
    def anchor_log_probs(self) -> Tensor:
        """[tokens]: π_old where it is known, else μ."""
        return self.behavior_log_probs if self.old_log_probs is None else self.old_log_probs

    @cached_property
    def safe_lengths(self) -> Tensor:
        """[num_sequences]: T, at least 1, to divide by."""
        return self.lengths.clamp(min=1)

    def masked(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """`values [tokens]` with masked tokens replaced."""
        return values if self.mask is None else torch.where(self.mask, values, fill)

    def prefix_min_log_ratio(self) -> Tensor:
        """[tokens]: min over the *preceding* unmasked tokens of the response of log ρ; 0 for the first.

        Puts the responses in a [num_sequences, longest] matrix by position and, under context parallelism, adds the
        ranks' matrices: a token-sized collective and one wait of the host, paid only by objectives that call this.
        """
        packed = self.sequences
        if self.positions is None:
            if packed.group is not None:
                raise UserError(
                    "this objective looks at preceding tokens, which other context parallel ranks hold",
                    where="positions",
                    expected="the index of each token in its whole response",
                    fix="pass positions [tokens]",
                )
            positions = torch.arange(packed.num_tokens, device=packed.device) - packed.offsets[packed.segment_ids]
        else:
            positions = self.positions
        longest = torch.zeros(1, dtype=torch.int64, device=packed.device)
        if packed.num_tokens:
            longest = (positions.max() + 1).reshape(1)
        if packed.group is not None:
            torch.distributed.all_reduce(longest, op=torch.distributed.ReduceOp.MAX, group=packed.group)
        width = int(longest)
        if width == 0:
            return self.log_ratio
        absent = torch.finfo(self.log_ratio.dtype).max
        matrix = self.log_ratio.new_zeros(packed.num_sequences, width)
        present = torch.zeros_like(matrix)
        rows = packed.segment_ids
        matrix[rows, positions] = self.log_ratio
        present[rows, positions] = 1.0 if self.mask is None else self.mask.to(matrix.dtype)
        if packed.group is not None:
            packed.all_reduce(matrix)
            packed.all_reduce(present)
        matrix = torch.where(present > 0, matrix, absent)
        preceding = torch.full_like(matrix, absent)
        preceding[:, 1:] = matrix.cummin(dim=1).values[:, :-1]
        preceding = torch.where(preceding == absent, 0.0, preceding)
        return preceding[rows, positions]


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
    """Why a correction is refused; empty: it is not."""

    @cached_property
    def hyperparameters(self) -> dict[str, object]:
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


def objective(name: str, *, level: str, aggregation: str, source: str, **details: str) -> Callable[[Phi], Phi]:
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
    found = Objective(name, phi, level, getattr(phi, "aggregation", "token-mean"), "the user's own")
    return replace(found)


def unknown(kind: str, name: str, known: Iterable[str], *, where: str) -> UserError:
    """The error for a name that is not known: says the nearest and lists all."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return UserError(
        f"unknown {kind} {name!r}" + (f"; the nearest is {near[0]!r}" if near else ""),
        where=where,
        expected="one of " + ", ".join(known) if known else f"no {kind}",
    )
