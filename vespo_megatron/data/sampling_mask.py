"""`SamplingMask`: what truncated sampling (top-k, top-p, min-p) left of the vocabulary, token by token.

A truncated μ gives probability to some tokens only. π is then taken over the same tokens, renormalised, so that
π/μ = 1 at equal weights and the ratio says what the policies differ in, not what was truncated ("keep sampling mask":
DeepSeek-V3.2, arXiv 2512.02556, section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class SamplingMask:
    """The tokens that each of R response tokens was drawn from, one list after another.

    `counts` int32 [R], how many; 0: from the whole vocabulary, or not drawn at all. `ids` int32 [Σ counts].
    """

    counts: np.ndarray
    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.counts)

    @classmethod
    def whole(cls, length: int) -> SamplingMask:
        """Nothing left out, for `length` tokens."""
        return cls(np.zeros(length, dtype=np.int32), np.zeros(0, dtype=np.int32))

    @classmethod
    def of(cls, lists: Sequence[Sequence[int] | np.ndarray]) -> SamplingMask:
        """One list per token."""
        ids = [np.asarray(each, dtype=np.int32) for each in lists]
        return cls(np.array([len(each) for each in ids], dtype=np.int32), np.concatenate([*ids, []]).astype(np.int32))

    @classmethod
    def concatenate(cls, parts: Sequence[SamplingMask]) -> SamplingMask:
        """The tokens of all parts, in order."""
        return cls(
            np.concatenate([np.zeros(0, np.int32), *(part.counts for part in parts)]),
            np.concatenate([np.zeros(0, np.int32), *(part.ids for part in parts)]),
        )

    def lists(self) -> list[np.ndarray]:
        """One per token; the inverse of `of`."""
        return np.split(self.ids, np.cumsum(self.counts)[:-1]) if len(self) else []

    @property
    def owners(self) -> np.ndarray:
        """int64 [Σ counts], the token that each of `ids` belongs to."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    def select(self, index: np.ndarray) -> SamplingMask:
        """The tokens at `index`, in that order."""
        counts = self.counts[index]
        starts = np.cumsum(self.counts, dtype=np.int64) - self.counts
        places = np.repeat(starts[index] - (np.cumsum(counts, dtype=np.int64) - counts), counts)
        return SamplingMask(counts, self.ids[places + np.arange(counts.sum())])

    def contains(self, token_ids: np.ndarray) -> np.ndarray:
        """bool [R]: whether each token is among those it was drawn from."""
        found = np.zeros(len(self.counts), dtype=bool)
        owners = self.owners
        found[owners[self.ids == token_ids[owners]]] = True
        return found | (self.counts == 0)
