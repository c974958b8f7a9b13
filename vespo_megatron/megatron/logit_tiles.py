"""Softmax statistics of a tile of logits, and the gradient of its logits, in PyTorch's operations on any device.

`triton_tiles` has the same two functions for a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

_HOST_BLOCK = 1 << 18
"""Numbers of a tile that the host works on at a time: what is made of them on the way stays in its cache."""


def softmax_statistics(
    tile: torch.Tensor,
    column: torch.Tensor,
    temperature: float,
    statistics: torch.Tensor,
    target: torch.Tensor,
    *,
    kept: bool,
) -> None:
    """Reduce a tile to a few numbers per row.

    Args:
        tile: logits [rows, columns], before the temperature; of no use afterwards unless `kept`.
        column: int64 [rows], where in the tile each row's target is; outside of it: another tile has it.
        statistics: [3, rows], written: the largest z, Σ e, Σ e·(z − largest), with z = logit / temperature and
            e = exp(z − largest).
        target: [rows], z of the target, written where this tile has it.
    """
    inside, place = _within(column, tile.shape[1])
    found = tile.gather(1, place)[:, 0].to(target.dtype) / temperature
    target.copy_(torch.where(inside[:, 0], found, target))
    for block in _blocks(tile):
        peak, total, weighted = statistics[:, block]
        z = _scaled(tile[block], temperature, in_place=not kept)
        torch.amax(z, dim=-1, out=peak)
        z.sub_(peak[:, None])
        e = z.exp()
        torch.sum(e, dim=-1, out=total)
        torch.sum(z.mul_(e), dim=-1, out=weighted)


def logit_gradient_(
    tile: torch.Tensor,
    column: torch.Tensor,
    temperature: float,
    log_sum: torch.Tensor,
    slopes: torch.Tensor,
    entropy: torch.Tensor | None,
) -> None:
    """Overwrite a tile with the gradient of its logits.

    Args:
        tile: logits [rows, columns], before the temperature.
        column: int64 [rows], as `softmax_statistics` takes it.
        log_sum: [rows], log Σ exp z over the whole vocabulary.
        slopes: [2, rows], ∂loss/∂log-prob and ∂loss/∂entropy, both over the temperature.
        entropy: [rows]; None where ∂loss/∂entropy is 0.
    """
    inside, place = _within(column, tile.shape[1])
    for block in _blocks(tile):
        of_log_prob, of_entropy = slopes[:, block, None]
        z = _scaled(tile[block], temperature).sub_(log_sum[block, None])
        if entropy is None:
            z.exp_().mul_(-of_log_prob)
        else:
            p = z.exp()
            z.add_(entropy[block, None]).mul_(of_entropy).add_(of_log_prob).mul_(p).neg_()
        z.scatter_add_(1, place[block], of_log_prob * inside[block])
        tile[block] = z


def _blocks(tile: torch.Tensor) -> Iterator[slice]:
    """Rows of a tile that are worked on together."""
    rows = max(_HOST_BLOCK // tile.shape[1], 1) if tile.device.type == "cpu" else max(len(tile), 1)
    return (slice(start, min(start + rows, len(tile))) for start in range(0, len(tile), rows))


def _within(column: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each row's target is in the tile, and a column to read or write either way; both [rows, 1]."""
    column = column[:, None]
    return (column >= 0) & (column < width), column.clamp(0, width - 1)


def _scaled(logits: torch.Tensor, temperature: float, *, in_place: bool = True) -> torch.Tensor:
    """The block in at least float32, to be written to; `in_place` where it is that already."""
    if logits.element_size() < 4:
        logits = logits.float()
    elif not in_place:
        logits = logits.clone()
    return logits if temperature == 1.0 else logits.div_(temperature)
