"""Mask over logits: tokens that truncated sampling could not have drawn leave the softmax, one tile at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vespo_megatron.data.sampling_mask import SamplingMask

_NOTHING = -1e30
"""A logit that weighs nothing; in float16 its lowest number. Finite: nothing it is multiplied by becomes NaN."""


@dataclass(frozen=True)
class LogitMask:
    """The E tokens that stay in the softmax, each with its row of R rows of logits, sorted by token id."""

    rows: torch.Tensor
    """int64 [E]"""
    token_ids: torch.Tensor
    """int64 [E]"""
    limited: torch.Tensor
    """bool [R]: rows that have a mask; the softmax of the others is over the whole vocabulary."""
    sorted_ids: np.ndarray
    """`token_ids` on the host, so that a tile finds its own without waiting for the device."""

    @classmethod
    def of(cls, sampling_mask: SamplingMask, device: torch.device) -> LogitMask:
        """From the token ids that each row could have drawn."""
        order = np.argsort(sampling_mask.ids, kind="stable")
        ids = sampling_mask.ids[order].astype(np.int64)
        return cls(
            rows=torch.from_numpy(sampling_mask.owners[order]).to(device),
            token_ids=torch.from_numpy(ids).to(device),
            limited=torch.from_numpy(sampling_mask.counts > 0).to(device),
            sorted_ids=ids,
        )

    def apply_(self, tile: torch.Tensor, rows: slice, first_id: int) -> None:
        """Mask a tile of logits [rows, tokens from `first_id`], in place."""
        height, width = tile.shape
        start, stop = np.searchsorted(self.sorted_ids, (first_id, first_id + width))
        leaves = tile.new_empty(height + 1, width, dtype=torch.bool)  # the last row takes what is another tile's
        leaves[:height] = self.limited[rows, None]
        row = self.rows[start:stop] - rows.start
        row = torch.where((row >= 0) & (row < height), row, height)
        leaves[row, self.token_ids[start:stop] - first_id] = False
        tile.masked_fill_(leaves[:height], max(_NOTHING, torch.finfo(tile.dtype).min))
