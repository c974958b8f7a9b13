"""Signs that training collapses, by stated rules on the metrics of each step. Pure.

The rules compare means over `guard.window` steps, so that one odd batch says nothing; every threshold is a recipe key,
null switches a rule off. A rule speaks when it begins to hold, and again only after it has stopped holding.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vespo_megatron.recipe.schema import GuardConfig


@dataclass(frozen=True)
class Finding:
    """One rule that has begun to hold."""

    rule: str
    text: str


class CollapseDetectors:
    """`observe` each step in turn, those before a resume too (`metrics.jsonl` has them)."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self._rules: dict[str, Callable[[Mapping[str, float]], str]] = {
            "reward": self._reward,
            "signal": self._signal,
            "length": self._length,
            "truncated": self._truncated,
            "entropy": self._entropy,
            "loss": self._loss,
        }
        self._history: dict[str, deque[float]] = {}
        self._first: dict[str, float] = {}
        self._best: dict[str, float] = {}
        self._count: dict[str, int] = {}
        self._holding: set[str] = set()

    def observe(self, metrics: Mapping[str, float | None]) -> list[Finding]:
        """What has begun to hold with this step; metrics that are missing or not finite are passed over."""
        values = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
        values = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        found = []
        for name, rule in self._rules.items():
            text = rule(values)
            if text and name not in self._holding:
                found.append(Finding(name, text))
            (self._holding.add if text else self._holding.discard)(name)
        return found

    def _mean(self, values: Mapping[str, float], name: str) -> float | None:
        """The mean over the last window; None before two windows have passed. Remembers the first and the best one."""
        window = self._history.setdefault(name, deque(maxlen=self.config.window))
        if name in values:
            window.append(values[name])
            self._count[name] = self._count.get(name, 0) + 1
        if len(window) < self.config.window:
            return None
        mean = math.fsum(value / len(window) for value in window)  # their sum may be beyond float64
        self._first.setdefault(name, mean)
        self._best[name] = max(mean, self._best.get(name, mean))
        return mean if self._count[name] >= 2 * self.config.window else None

    def _reward(self, values: Mapping[str, float]) -> str:
        now, limit = self._mean(values, "reward/mean"), self.config.reward_drop
        if now is None or limit is None or self._best["reward/mean"] - now <= limit:
            return ""
        return f"reward/mean fell from {self._best['reward/mean']:.4g} to {now:.4g} (guard.reward_drop {limit:g})"

    def _signal(self, values: Mapping[str, float]) -> str:
        now = self._mean(values, "reward/std")
        return "every reward has been the same for a whole window: there is nothing to learn from" if now == 0 else ""

    def _length(self, values: Mapping[str, float]) -> str:
        return self._fallen(values, "response/length_mean", self.config.length_drop, "guard.length_drop")

    def _entropy(self, values: Mapping[str, float]) -> str:
        return self._fallen(values, "policy/entropy", self.config.entropy_drop, "guard.entropy_drop")

    def _fallen(self, values: Mapping[str, float], name: str, share: float | None, key: str) -> str:
        now = self._mean(values, name)
        if now is None or share is None or now >= share * self._first[name]:
            return ""
        return f"{name} fell from {self._first[name]:.4g} to {now:.4g} ({key} {share:g})"

    def _truncated(self, values: Mapping[str, float]) -> str:
        now, limit = self._mean(values, "response/truncated_fraction"), self.config.truncated_share
        if now is None or limit is None or now <= limit or self._first["response/truncated_fraction"] > limit:
            return ""
        return f"{now:.0%} of the responses are cut off at their limit (guard.truncated_share {limit:g})"

    def _loss(self, values: Mapping[str, float]) -> str:
        name, factor = "loss/grad_norm_max", self.config.loss_spike
        window = self._history.get(name, ())
        usual = statistics.median(window) if len(window) == self.config.window else None
        self._mean(values, name)
        if usual is None or factor is None or name not in values or values[name] <= factor * usual or usual == 0:
            return ""
        return f"{name} is {values[name]:.4g}, the usual is {usual:.4g} (guard.loss_spike {factor:g})"
