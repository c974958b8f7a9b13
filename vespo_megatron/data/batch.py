"""`Batch`: samples with their advantages, the unit that is planned, scattered to ranks and cut into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vespo_megatron.data.sample import Sample


@dataclass
class Batch:
    """B samples and what the loss needs beside them."""

    samples: list[Sample]
    advantages: np.ndarray
    """float32 [B]"""
    lags: np.ndarray | None = None
    """int64 [B]: how many weight versions the oldest token of each is behind; None in a synchronous run."""

    def __post_init__(self) -> None:
        if len(self.samples) != len(self.advantages):
            raise ValueError(f"{len(self.samples)} samples but {len(self.advantages)} advantages")

    def __len__(self) -> int:
        return len(self.samples)

    def select(self, indices: Sequence[int]) -> Batch:
        """The samples at `indices`, in that order."""
        rows = np.asarray(indices, dtype=int)
        lags = None if self.lags is None else self.lags[rows]
        return Batch([self.samples[index] for index in indices], self.advantages[rows], lags)
