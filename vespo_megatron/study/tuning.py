"""What each variant of a study is run at, chosen beforehand on seeds that the study does not use::

    tune:
      key: policy.megatron_cfg.optimizer.lr
      values: [2.0e-4, 4.0e-4, 8.0e-4]
      seeds: [101, 102]
      at: [N=32]         # a level of each axis but the first: where it is chosen

One rate for all decides which objective looks best. So each level of the first axis is run at every value, and has from
then on the one at which its mean accuracy over those seeds is highest (the first of equals). A level that `baselines`
compares with another has the other's value: a remedy is judged beside its own objective, at the same rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from vespo_megatron.study.comparison import mean_of
from vespo_megatron.study.outcomes import Outcome
from vespo_megatron.study.spec import Study, Tuning
from vespo_megatron.study.statistics import Mean


@dataclass(frozen=True)
class Choice:
    """The value of one level of the first axis."""

    variant: str
    value: str
    accuracies: Mapping[str, Mean]
    """By value, in the study's order."""

    @property
    def at_an_end(self) -> bool:
        """Whether the best value is the first or the last tried, so that a better one may lie beyond."""
        return self.value in (next(iter(self.accuracies)), next(reversed(list(self.accuracies))))

    @property
    def sentence(self) -> str:
        """As the report has it."""
        tried = ", ".join(f"{value}: {mean.text()}" for value, mean in self.accuracies.items())
        return f"{self.variant}: {self.value}{', an end of what was tried' if self.at_an_end else ''} ({tried})"


def tuning_study(study: Study, tuning: Tuning) -> Study:
    """The runs from which values are chosen, in a folder below the study's."""
    name = tuning.key.rpartition(".")[2]
    first, *others = study.axes.items()
    at = [text for (_, levels), level in zip(others, tuning.at, strict=True) for text in levels[level]]
    return replace(
        study,
        name=f"{study.name}, tuning",
        output=study.output / "tune",
        seeds=tuning.seeds,
        axes={
            first[0]: {level: (*texts, *at) for level, texts in first[1].items() if level not in study.baselines},
            name: {f"{name}={value}": (f"{tuning.key}={value}",) for value in tuning.values},
        },
        also=(),
        primary=(),
        baselines={},
        tuning=None,
        exploratory_seeds=None,
        published=type(study.published)(),
    )


def choices(outcomes: Sequence[Outcome]) -> list[Choice] | None:
    """What the runs of `tuning_study` say; None while one of them has not finished."""
    if any(math.isnan(outcome.accuracy) for outcome in outcomes):
        return None
    found: dict[str, dict[str, list[float]]] = {}
    for outcome in outcomes:
        variant, value = outcome.cell.levels
        found.setdefault(variant, {}).setdefault(value, []).append(outcome.accuracy)
    chosen = []
    for variant, by_value in found.items():
        means = {value: mean_of(accuracies) for value, accuracies in by_value.items()}
        chosen.append(Choice(variant, max(means, key=lambda value: means[value].value), means))
    return chosen


def tuned(study: Study, tuning: Tuning, chosen: Sequence[Choice]) -> Study:
    """The study with each level of the first axis at its value."""
    values = {choice.variant: choice.value.partition("=")[2] for choice in chosen}
    name, levels = next(iter(study.axes.items()))
    at_value = {
        level: (*texts, f"{tuning.key}={values[study.baselines.get(level, level)]}") for level, texts in levels.items()
    }
    return replace(study, axes={**study.axes, name: at_value})
