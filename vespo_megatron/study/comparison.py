"""A study's runs, variant by variant: means over seeds, and differences to what each variant is compared with."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vespo_megatron.study.measures import LATE, RATIOS
from vespo_megatron.study.outcomes import Outcome
from vespo_megatron.study.spec import Primary, Study
from vespo_megatron.study.statistics import Difference, Mean, holm, mean, paired

ACCURACY = "accuracy"


@dataclass(frozen=True)
class Row:
    """A variant within one setting of the other axes."""

    variant: str
    setting: tuple[str, ...]
    runs: list[Outcome]
    accuracy: Mean
    best: Mean
    collapsed: int
    late: dict[str, Mean]
    baseline: str | None
    """The variant it is compared with; None for the study's baseline itself."""
    differences: dict[str, Difference]
    """To the baseline, by measure: the accuracy, and late means that the study compares (of logarithms for `RATIOS`).

    Empty for the study's baseline itself; without the accuracy where that is a primary comparison."""

    @property
    def verdict(self) -> str:
        """Of the accuracy; "" where the row has no such comparison."""
        return self.differences[ACCURACY].verdict if ACCURACY in self.differences else ""

    @property
    def finished(self) -> int:
        """How many of its runs have."""
        return sum(run.state == "finished" for run in self.runs)


@dataclass(frozen=True)
class Stated:
    """What became of a comparison that was stated before."""

    primary: Primary
    difference: Difference
    """Of the accuracy; `adjusted_p` is corrected over the primary comparisons alone."""

    @property
    def outcome(self) -> str:
        """The verdict, beside what was expected."""
        verdict = self.difference.verdict
        if not self.primary.expects_more or verdict not in ("higher", "lower"):
            return verdict
        return f"{verdict}, as expected" if verdict == "higher" else f"{verdict}, against what was expected"


def compare_primary(study: Study, outcomes: Sequence[Outcome]) -> list[Stated]:
    """The study's primary comparisons, in its order, over the seeds that both of a pair have finished."""
    by_levels = _by_levels(outcomes)
    found = [
        _difference(by_levels[(each.variant, *each.setting)], by_levels[(each.against, *each.setting)], ACCURACY)
        for each in study.primary
    ]
    return [Stated(each, difference) for each, difference in zip(study.primary, holm(found), strict=True)]


def compare_rows(study: Study, outcomes: Sequence[Outcome]) -> list[Row]:
    """Rows by setting, then variant, compared over the seeds that both of a pair have finished.

    Comparisons that the study states as primary have no part in these rows' correction of the accuracy.
    """
    by_levels = _by_levels(outcomes)
    stated = {(each.setting, each.variant, each.against) for each in study.primary}
    places = [(setting, variant) for setting in study.settings for variant in study.variants]
    baselines = {variant: study.baseline_of(variant) for variant in study.variants}
    compared = [(s, v, baseline) for s, v in places if (baseline := baselines[v]) is not None]
    differences: dict[tuple[tuple[str, ...], str], dict[str, Difference]] = {place: {} for place in places}
    for measure in (ACCURACY, *study.also):
        exploratory = [place for place in compared if measure != ACCURACY or place not in stated]
        pairs = [(by_levels[(v, *s)], by_levels[(baseline, *s)]) for s, v, baseline in exploratory]
        found = holm([_difference(variant, baseline, measure) for variant, baseline in pairs])
        for (s, v, _), difference in zip(exploratory, found, strict=True):
            differences[s, v][measure] = difference
    rows = []
    for setting, variant in places:
        runs = by_levels[(variant, *setting)]
        rows.append(
            Row(
                variant=variant,
                setting=setting,
                runs=runs,
                accuracy=mean_of(run.accuracy for run in runs),
                best=mean_of(run.best for run in runs if run.state == "finished"),
                collapsed=sum(run.collapsed for run in runs),
                late={name: mean_of(run.late[name] for run in runs if run.state == "finished") for name in LATE},
                baseline=study.baseline_of(variant),
                differences=differences[setting, variant],
            )
        )
    return rows


def _by_levels(outcomes: Sequence[Outcome]) -> dict[tuple[str, ...], list[Outcome]]:
    by_levels: dict[tuple[str, ...], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_levels[outcome.cell.levels].append(outcome)
    return by_levels


def _difference(variant: Sequence[Outcome], baseline: Sequence[Outcome], measure: str) -> Difference:
    """Over the seeds that both have finished."""

    def value(run: Outcome) -> float:
        if measure == ACCURACY or run.state != "finished":
            return run.accuracy
        late = run.late[measure]
        return (math.log(late) if late > 0 else math.nan) if measure in RATIOS else late

    by_seed = {run.cell.seed: value(run) for run in baseline}
    pairs = [(value(run), by_seed[run.cell.seed]) for run in variant if run.cell.seed in by_seed]
    known = [pair for pair in pairs if not any(map(math.isnan, pair))]
    return paired([left for left, _ in known], [right for _, right in known])


def mean_of(values: Iterable[float]) -> Mean:
    """Of those that are there: NaN says that a run has none."""
    return mean([value for value in values if not math.isnan(value)])
