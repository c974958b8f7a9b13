"""`vespo-megatron predict`: φ, ESS and the share of responses with φ > ½ by length, for each behaviour policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vespo_megatron.losses.expected_mismatch import expected_mismatch, objective_hyperparameters, ratio_divergence
from vespo_megatron.losses.hyperparameters import COMMON
from vespo_megatron.losses.predicted import Divergence, Prediction, predict
from vespo_megatron.losses.registry import get_objective
from vespo_megatron.plan.measured_mismatch import Measured, ResponseLengths, Row, ratio_of_step
from vespo_megatron.recipe.schema import Recipe

BEHAVIORS = {"rollout": "rollout", "recompute": "recompute, version"}
"""Behaviour → how its rows are called: recompute and version differ in what is stale, not in how W widens with it."""
COLUMNS = ("W", "tokens", "φ, A ≥ 0", "φ, A < 0", "ESS of W", "φ > ½, A ≥ 0", "φ > ½, A < 0")
KNOWLEDGE = ("from k3", "k3 and k2", "and E[W] by sign")
"""What a prediction for a run's own steps is made of."""
_CHECKED_STEPS = 64
_LENGTHS = 8


@dataclass(frozen=True)
class Scenario:
    """An objective, and how far the policies are apart."""

    name: str
    hyperparameters: dict[str, Any]
    engine: Divergence
    staleness: Divergence
    lines: tuple[str, ...]
    """Where the divergences are from, and what is left out."""

    @property
    def behaviors(self) -> list[str]:
        """Those that the objective can be trained with."""
        return [name for name in BEHAVIORS if name != "rollout" or get_objective(self.name).anchor != "old"]

    def at(self, behavior: str, length: int) -> Prediction:
        """The prediction for responses of `length` tokens."""
        compared = ratio_divergence(self.name, behavior, self.engine, self.staleness)
        return predict(self.name, compared, length, hyperparameters=self.hyperparameters)


def scenario(
    recipe: Recipe,
    *,
    engine: Divergence | None = None,
    staleness: Divergence | None = None,
    measured: Measured | None = None,
) -> Scenario:
    """What the recipe trains, with divergences as given, else as measured, else as expected."""
    if engine is not None:
        source = "as given"
    elif measured is not None:
        engine, source = measured.engine, measured.source
    else:
        expected = expected_mismatch(recipe)
        engine, source = Divergence(expected.k3), expected.source
    if staleness is not None:
        stale_source = "as given"
    elif measured is not None:
        staleness, stale_source = measured.staleness, "measured"
    else:
        staleness, stale_source = Divergence(0.0), "none: give --staleness-k3, or --from a run"
    lines = [
        f"{recipe.loss_fn.name}, behavior {recipe.loss_fn.behavior}"
        + (f" ({recipe.behavior})" if recipe.loss_fn.behavior == "auto" else ""),
        f"engine and trainer: {_moments(engine)} per token ({source})",
        f"staleness: {_moments(staleness)} per token ({stale_source})",
        *(f"note: {note}" for note in (measured.notes if measured else ())),
        *left_out(recipe),
    ]
    return Scenario(recipe.loss_fn.name, objective_hyperparameters(recipe), engine, staleness, tuple(lines))


def left_out(recipe: Recipe) -> list[str]:
    """Parts of the loss that the prediction does not have."""
    found = ["loss_fn.correction"] if recipe.loss_fn.correction else []
    found += [f"loss_fn.hyperparameters.{name}" for name in recipe.loss_fn.hyperparameters if name in COMMON]
    return [f"note: {', '.join(found)} left out: φ is of the ratio alone"] if found else []


def default_lengths(longest: int) -> list[int]:
    """A sixteenth, an eighth, … of the longest response, and it."""
    return sorted({max(1, longest >> shift) for shift in range(5)})


def table(made: Scenario, lengths: Sequence[int], drawn: ResponseLengths | None = None) -> str:
    """The prediction as Markdown, a row per behaviour and length; of a run's own lengths as well where `drawn`."""
    rows = []
    for behavior in made.behaviors:
        rows += [_row(BEHAVIORS[behavior], f"{length}", made.at(behavior, length)) for length in lengths]
        if drawn is not None:
            values = [vars(made.at(behavior, length)).values() for length in likely_lengths(drawn)]
            mean = Prediction(*np.mean([list(each) for each in values], axis=0).tolist())
            rows.append(_row(BEHAVIORS[behavior], f"{drawn.mean:.0f} ± {drawn.std:.0f}", mean))
    return _markdown(COLUMNS, rows)


def likely_lengths(drawn: ResponseLengths) -> list[int]:
    """Equally likely lengths with that mean and deviation, at most the longest; of a gamma distribution."""
    if drawn.std < 0.05 * drawn.mean:
        return [max(1, round(drawn.mean))]
    shape = (drawn.mean / drawn.std) ** 2
    sample = np.sort(np.random.default_rng(0).gamma(shape, drawn.mean / shape, 4096)).reshape(_LENGTHS, -1).mean(1)
    return [max(1, round(min(float(length), drawn.max))) for length in sample]


@dataclass(frozen=True)
class CheckedPhi:
    """φ of a run's steps, mean over them."""

    label: str
    measured: float
    predicted: tuple[float, ...]
    """In the order of `KNOWLEDGE`."""


def check_run(measured: Measured) -> list[CheckedPhi] | None:
    """φ that the run had beside φ predicted from each of its steps; None where it measured none.

    Of sequence objectives by the sign of A; of token objectives over both.
    """
    recipe = measured.recipe
    if recipe is None:
        return None
    by_sign = get_objective(recipe.loss_fn.name).level == "sequence"
    wanted = ("vespo/phi_mean_positive", "vespo/phi_mean_negative") if by_sign else ("vespo/phi_mean",)
    rows = [row for row in measured.rows if all(row.get(name) is not None for name in wanted)]
    rows = [rows[i] for i in sorted({round(i) for i in np.linspace(0, len(rows) - 1, _CHECKED_STEPS)})] if rows else []
    if not rows:
        return None
    predicted = np.mean([_predict_step(recipe, row, by_sign) for row in rows], axis=0).tolist()
    labels = ("φ, A ≥ 0", "φ, A < 0") if by_sign else ("φ",)
    return [
        CheckedPhi(label, math.fsum(row[name] for row in rows) / len(rows), tuple(values))
        for label, name, values in zip(labels, wanted, predicted, strict=True)
    ]


def check_table(measured: Measured) -> str | None:
    """`check_run` as Markdown."""
    found, recipe = check_run(measured), measured.recipe
    if found is None or recipe is None:
        return None
    lines = [[each.label, *(f"{value:.3f}" for value in (each.measured, *each.predicted))] for each in found]
    title = f"The run itself, {recipe.loss_fn.name} with behavior {recipe.behavior}, mean of its steps:"
    return "\n".join([title, "", _markdown(("", "measured", *KNOWLEDGE), lines), *left_out(recipe)])


def _predict_step(recipe: Recipe, row: Row, by_sign: bool) -> list[list[float]]:
    """φ of A ≥ 0 and of A < 0, or of both in one, in one step; each from ever more of what the step has measured."""
    known = ratio_of_step(row, recipe.behavior)
    mean_w = (row.get("vespo/w_mean_positive") or 1.0, row.get("vespo/w_mean_negative") or 1.0)
    length = row.get("response/length_mean") or recipe.policy.generation.max_new_tokens
    drawn = ResponseLengths(length, row.get("response/length_std") or 0.0, row.get("response/length_max") or length)
    columns = []
    for divergence, means in ((Divergence(known.k3), (1.0, 1.0)), (known, (1.0, 1.0)), (known, mean_w)):
        made = [
            predict(
                recipe.loss_fn.name,
                divergence,
                each,
                hyperparameters=objective_hyperparameters(recipe),
                mean_w=means,
            )
            for each in likely_lengths(drawn)
        ]
        positive, negative = (
            math.fsum(values) / len(made)
            for values in zip(*((p.phi_positive, p.phi_negative) for p in made), strict=True)
        )
        share = _positive_share(row)
        columns.append([positive, negative] if by_sign else [share * positive + (1 - share) * negative])
    return np.transpose(columns).tolist()


def _positive_share(row: Row) -> float:
    positive, negative = (row.get(f"vespo/count_{sign}") or 0.0 for sign in ("positive", "negative"))
    return positive / (positive + negative) if positive + negative else 0.5


def _moments(divergence: Divergence) -> str:
    return f"k3 = {divergence.k3:.3g}" + ("" if divergence.k2 is None else f", k2 = {divergence.k2:.3g}")


def _row(behavior: str, tokens: str, made: Prediction) -> tuple[str, ...]:
    phi = (f"{made.phi_positive:.3f}", f"{made.phi_negative:.3f}")
    share = (f"{made.above_half_positive:.3f}", f"{made.above_half_negative:.3f}")
    return (behavior, tokens, *phi, f"{made.ess:.3g}", *share)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
