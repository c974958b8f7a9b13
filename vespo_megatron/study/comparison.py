"""A study's runs, variant by variant: means over seeds, and differences to what each variant is compared with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vespo_megatron.study.measures import LATE, RATIOS
from vespo_megatron.study.outcomes import Outcome
from vespo_megatron.study.spec import Study
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

    Empty for the study's baseline itself."""

    @property
    def finished(self) -> int:
        """How many of its runs have."""
        return sum(run.state == "finished" for run in self.runs)


def compare_rows(study: Study, outcomes: Sequence[Outcome]) -> list[Row]:
    """Rows by setting, then variant, compared over the seeds that both of a pair have finished."""
    by_levels: dict[tuple[str, ...], list[Outcome]] = {}
    for outcome in outcomes:
        by_levels.setdefault(outcome.cell.levels, []).append(outcome)
    places = [(setting, variant) for setting in study.settings for variant in study.variants]
    baselines = {variant: study.baseline_of(variant) for variant in study.variants}
    compared = [(s, v, baseline) for s, v in places if (baseline := baselines[v]) is not None]
    differences: dict[tuple[tuple[str, ...], str], dict[str, Difference]] = {place: {} for place in places}
    for measure in (ACCURACY, *study.also):
        pairs = [(by_levels[(v, *s)], by_levels[(baseline, *s)]) for s, v, baseline in compared]
        found = holm([_difference(variant, baseline, measure) for variant, baseline in pairs])
        for (s, v, _), difference in zip(compared, found, strict=True):
            differences[s, v][measure] = difference
    rows = []
    for setting, variant in places:
        runs = by_levels[(variant, *setting)]
        rows.append(
            Row(
                variant=variant,
                setting=setting,
                runs=runs,
                accuracy=_mean(run.accuracy for run in runs),
                best=_mean(run.best for run in runs if run.state == "finished"),
                collapsed=sum(run.collapsed for run in runs),
                late={name: _mean(run.late[name] for run in runs if run.state == "finished") for name in LATE},
                baseline=study.baseline_of(variant),
                differences=differences[setting, variant],
            )
        )
    return rows


def _difference(variant: Sequence[Outcome], baseline: Sequence[Outcome], measure: str) -> Difference:
    """Over the seeds that both have finished."""

    def value(run: Outcome) -> float:
        if measure == ACCURACY or run.state != "finished":
            return run.accuracy
        late = run.late[measure]
        return (math.log(late) if late > 0 else math.nan) if measure in RATIOS else late

    pairs = [(value(left), value(right)) for left, right in zip(variant, baseline, strict=True)]
    known = [pair for pair in pairs if not any(map(math.isnan, pair))]
    return paired([left for left, _ in known], [right for _, right in known])


def _mean(values: Iterable[float]) -> Mean:
    return mean([value for value in values if not math.isnan(value)])
