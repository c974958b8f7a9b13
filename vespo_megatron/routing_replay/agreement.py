"""Agreement of two sets of expert routes: engine against trainer, and θ_old against θ."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Agreement:
    """Sums and counts, so that micro-batches and ranks add up.

    Layers are global numbers from 1. Overlap is |I ∩ J| / topk of one token in one layer.
    """

    overlap: dict[int, tuple[float, int]] = field(default_factory=dict)
    """Layer → (Σ overlap, tokens)."""
    differing: int = 0
    """Tokens with another set of experts in at least one of the layers looked at."""
    tokens: int = 0

    def add(self, layers: Sequence[int], a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Count [rows, layers, topk] against the same; returns bool [rows], True where any of these layers differs."""
        topk = a.shape[-1]
        shared = (a[..., :, None] == b[..., None, :]).any(axis=-1).sum(axis=-1)  # [rows, layers]
        for column, layer in enumerate(layers):
            total, count = self.overlap.get(layer, (0.0, 0))
            self.overlap[layer] = (total + float(shared[:, column].sum()) / topk, count + len(shared))
        return (shared < topk).any(axis=1)

    def add_tokens(self, differs: np.ndarray) -> None:
        """Count tokens once, given over all layers of the model whether any differs."""
        self.differing += int(differs.sum())
        self.tokens += len(differs)

    @classmethod
    def sum(cls, parts: Iterable[Agreement]) -> Agreement:
        """The total of what several ranks counted."""
        total = cls()
        for part in parts:
            total.differing += part.differing
            total.tokens += part.tokens
            for layer, (overlap, count) in part.overlap.items():
                before = total.overlap.get(layer, (0.0, 0))
                total.overlap[layer] = (before[0] + overlap, before[1] + count)
        return total

    def metrics(self, prefix: str) -> dict[str, float]:
        """`<prefix>agreement` (mean over layers), `<prefix>agreement_layer_<n>`, `<prefix>differing_tokens`."""
        if not self.tokens:
            return {}
        layers = {layer: overlap / count for layer, (overlap, count) in sorted(self.overlap.items())}
        return {
            f"{prefix}agreement": sum(layers.values()) / len(layers),
            f"{prefix}differing_tokens": self.differing / self.tokens,
            **{f"{prefix}agreement_layer_{layer}": value for layer, value in layers.items()},
        }
