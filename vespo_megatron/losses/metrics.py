"""`MetricSums`: metrics as sums and counts, so that they add over micro-batches and ranks to exact global values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vespo_megatron.losses.one_line import OneLine


@dataclass(repr=False)
class MetricSums(OneLine):
    """Additive parts of metrics; every value stays on its device until `to_floats()`.

    Add over micro-batches with `+`, then `all_reduce` over **data parallel × context parallel** ranks (megatron-core's
    data parallel group *with* context parallel), once per update. Context parallelism needs no further care: what
    every context parallel rank knows (per-sequence metrics) is reported by the first one alone, the others holding
    zeros; per-token metrics are each rank's own tokens.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    """Name → float64 [2]: a sum and the count it is to be divided by."""
    maxima: dict[str, Tensor] = field(default_factory=dict)
    """Name → float64 []: −inf where there was nothing."""
    minima: dict[str, Tensor] = field(default_factory=dict)
    """Name → float64 []: inf where there was nothing."""
    log_sums: dict[str, Tensor] = field(default_factory=dict)
    """Name → float64 []: log Σ e^x, for sums that overflow."""
    histograms: dict[str, tuple[tuple[float, ...], Tensor]] = field(default_factory=dict)
    """Name → (edges [bins + 1], counts float64 [bins])."""

    def add(self, name: str, total: Tensor, count: Tensor | float) -> None:
        """Record `total` of `count` items; numbers that are not finite are left to the caller to keep out."""
        total = total.to(torch.float64)
        # A number is written by the device, and a tensor travels by itself: copying either would wait for the device.
        if isinstance(count, Tensor):
            count = count.to(total.device, torch.float64, non_blocking=True)
        else:
            count = total.new_full((), count)
        self.sums[name] = torch.stack([total, count])

    def __add__(self, other: MetricSums) -> MetricSums:
        def merge(a: dict[str, Any], b: dict[str, Any], join: Callable[[Any, Any], Any]) -> dict[str, Any]:
            return {**a, **{name: join(a[name], value) if name in a else value for name, value in b.items()}}

        return MetricSums(
            merge(self.sums, other.sums, torch.add),
            merge(self.maxima, other.maxima, torch.maximum),
            merge(self.minima, other.minima, torch.minimum),
            merge(self.log_sums, other.log_sums, torch.logaddexp),
            merge(self.histograms, other.histograms, lambda a, b: (a[0], a[1] + b[1])),
        )

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> MetricSums:
        """The global metrics, on every rank of `group` (None: all ranks). Two collectives, whatever the number."""
        extremes = list(self.maxima.values()) + [-value for value in self.minima.values()]
        extremes += list(self.log_sums.values())
        counts = list(self.sums.values()) + [value for _, value in self.histograms.values()]
        if extremes:
            top = torch.stack(extremes)
            dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
            tops = list(top.unbind())
        num_max, num_min = len(self.maxima), len(self.minima)
        log_tops = tops[num_max + num_min :] if extremes else []
        scaled = [
            torch.where(top.isinf(), 0.0, (value - top).exp()).reshape(1)
            for value, top in zip(self.log_sums.values(), log_tops, strict=True)
        ]
        parts = counts + scaled
        if parts:
            flat = torch.cat(parts)
            dist.all_reduce(flat, op=dist.ReduceOp.SUM, group=group)
            pieces = list(flat.split([len(part) for part in parts]))
        else:
            pieces = []
        num_sums, num_histograms = len(self.sums), len(self.histograms)
        return MetricSums(
            dict(zip(self.sums, pieces[:num_sums], strict=True)),
            dict(zip(self.maxima, tops[:num_max] if extremes else [], strict=True)),
            {n: -v for n, v in zip(self.minima, tops[num_max : num_max + num_min] if extremes else [], strict=True)},
            {
                name: top + piece[0].log()
                for name, top, piece in zip(self.log_sums, log_tops, pieces[num_sums + num_histograms :], strict=True)
            },
            {
                name: (edges, piece)
                for (name, (edges, _)), piece in zip(
                    self.histograms.items(), pieces[num_sums : num_sums + num_histograms], strict=True
                )
            },
        )

    def empty_like(self) -> MetricSums:
        """The same names holding nothing: what a rank reports that must not count."""
        return MetricSums(
            {n: torch.zeros_like(v) for n, v in self.sums.items()},
            {n: torch.full_like(v, -torch.inf) for n, v in self.maxima.items()},
            {n: torch.full_like(v, torch.inf) for n, v in self.minima.items()},
            {n: torch.full_like(v, -torch.inf) for n, v in self.log_sums.items()},
            {n: (e, torch.zeros_like(c)) for n, (e, c) in self.histograms.items()},
        )

    def to_floats(self) -> tuple[dict[str, tuple[float, float]], dict[str, float]]:
        """(sums with counts, everything else) on the host: the one place that waits for the device."""
        flat = [*self.sums.values()]
        rest = {**self.maxima, **self.minima, **self.log_sums}
        everything = (
            torch.cat([value.reshape(-1) for value in [*flat, *rest.values()]]).tolist() if flat or rest else []
        )
        pairs = {name: (everything[2 * i], everything[2 * i + 1]) for i, name in enumerate(self.sums)}
        return pairs, dict(zip(rest, everything[2 * len(pairs) :], strict=True))

    def finalize(self) -> dict[str, float]:
        """Public metric names → numbers (rows of `metrics.table`); names that had nothing to count are absent."""
        from vespo_megatron.losses.diagnostics import finalize

        return finalize(self)
