"""Means with confidence intervals and paired comparisons, for the few seeds that studies have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95
"""Of every interval; a difference is called one when its adjusted p is below 1 − LEVEL."""


@dataclass(frozen=True)
class Mean:
    """A mean over seeds. `half` is half the width of Student's interval; NaN for a single seed."""

    value: float
    half: float
    count: int

    def text(self, digits: int = 3) -> str:
        if math.isnan(self.value):
            return "-"
        interval = "" if math.isnan(self.half) else f" ± {self.half:.{digits}f}"
        return f"{self.value:.{digits}f}{interval}"


def mean(values: Sequence[float]) -> Mean:
    """Of independent values; without any it is NaN."""
    from scipy import stats

    count = len(values)
    if count == 0:
        return Mean(math.nan, math.nan, 0)
    value = math.fsum(values) / count
    if count == 1:
        return Mean(value, math.nan, 1)
    variance = math.fsum((one - value) ** 2 for one in values) / (count - 1)
    return Mean(value, float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * math.sqrt(variance / count), count)


@dataclass(frozen=True)
class Difference:
    """A variant minus the baseline, seed by seed."""

    mean: Mean
    p: float
    """Two-sided, of Student's paired test, or of the signs where all differences are the same (1 where they are zero);
    NaN for fewer than two pairs."""
    adjusted_p: float = math.nan
    """After Holm's correction over all comparisons of the study."""

    @property
    def verdict(self) -> str:
        """'higher', 'lower', or 'no difference found'."""
        if math.isnan(self.adjusted_p):
            return "too few seeds to say"
        if self.adjusted_p >= 1 - LEVEL:
            return "no difference found"
        return "higher" if self.mean.value > 0 else "lower"


def paired(variant: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Compare values of the same seeds, in the same order."""
    from scipy import stats

    differences = [left - right for left, right in zip(variant, baseline, strict=True)]
    summary = mean(differences)
    if len(differences) < 2:
        return Difference(summary, math.nan)
    if max(differences) - min(differences) < 1e-9:
        # No spread to test against. An accuracy over a hundred answers has few values, so that three seeds often differ
        # by the same; all that is known then is that n signs agree.
        return Difference(summary, 1.0 if abs(summary.value) < 1e-9 else 2.0 ** (1 - len(differences)))
    return Difference(summary, float(stats.ttest_1samp(differences, 0.0).pvalue))


def holm(differences: Sequence[Difference]) -> list[Difference]:
    """The same with `adjusted_p`, in the same order (Holm, Scand. J. Statist. 6:65, 1979)."""
    tested = sorted((d.p, number) for number, d in enumerate(differences) if not math.isnan(d.p))
    adjusted = [math.nan] * len(differences)
    highest = 0.0
    for rank, (p, number) in enumerate(tested):
        highest = max(highest, min(1.0, p * (len(tested) - rank)))
        adjusted[number] = highest
    return [Difference(d.mean, d.p, value) for d, value in zip(differences, adjusted, strict=True)]
