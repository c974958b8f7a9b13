"""Values of a step's parts merged into the step's, as the table says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vespo_megatron.metrics.table import Merge, metric


def merge(name: str, values: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """One value of several, which are in the order of the parts.

    Args:
        weights: sizes of the parts, for a mean; None: all the same.

    Raises:
        ValueError: nothing to merge, or a metric that is not made of its parts' values.
        UserError: no such metric.
    """
    rule = metric(name).merge
    if not values:
        raise ValueError(f"{name} has no values")
    if rule is Merge.SUM:
        return sum(values)
    if rule is Merge.MIN:
        return min(values)
    if rule is Merge.MAX:
        return max(values)
    if rule is Merge.LAST:
        return values[-1]
    if rule is Merge.MEAN:
        if weights is None:
            return sum(values) / len(values)
        return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)
    raise ValueError(f"{name} is computed of the whole, not of its parts' values")


def merge_rows(rows: Sequence[Mapping[str, float]], weights: Sequence[float] | None = None) -> dict[str, float]:
    """Each metric of the parts, merged over those that have it; metrics of the whole are left out."""
    weights = [1.0] * len(rows) if weights is None else weights
    merged = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        if metric(name).merge is not Merge.WHOLE:
            having = [(row[name], weight) for row, weight in zip(rows, weights, strict=True) if name in row]
            values, sizes = zip(*having, strict=True)
            merged[name] = merge(name, values, None if len(set(sizes)) == 1 else sizes)
    return merged
