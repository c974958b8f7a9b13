"""Token log-probs (and entropy) from hidden states, vocab-parallel, without ever keeping tokens × vocabulary.

The logits are made a tile at a time, [rows, some of the vocabulary], and reduced to a few numbers per row. The
backward makes each tile again and overwrites it with the gradient of the logits, from which both gradients are
accumulated: one matrix product more than the plain form (4/3 of its work), a few tiles instead of tokens × vocabulary
several times over. As many of the last tiles as the memory allows are kept for the backward and not made again. Tiles
span all rows where they can, so that the weight's gradient is written once per tile, and straight into megatron-core's
`main_grad` where there is one: no second tensor of the embedding's size exists.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from vespo_megatron.losses.sequence import has_triton
from vespo_megatron.megatron import logit_tiles
from vespo_megatron.megatron.logit_mask import LogitMask
from vespo_megatron.megatron.parameter_marks import marks

_ENOUGH_ROWS = 2048
"""Rows that a tile may have whatever its width: fewer would make the products of a small budget slow."""
_WIDTH_STEP = 128
"""A tile's width is a multiple of it: a GPU's matrix units want rows that start on 16 bytes, and whole blocks."""
_TILES_AT_ONE_TIME = 8
"""What the memory is divided into: one tile to work on, and those that are kept."""


@dataclass(frozen=True)
class LogProbRequest:
    """Which log-probs are wanted. Shapes: R rows out of this rank's T tokens.

    `rows` int64 [R] into the T tokens (after sequence parallel gathering), `targets` int64 [R] token ids whose
    log-probability each row gives, `temperature` divides the logits, `memory_bytes` is what logits may take at
    one time, `logit_mask` is what sampling could not have drawn.
    """

    rows: torch.Tensor
    targets: torch.Tensor
    temperature: float = 1.0
    memory_bytes: int = 64 << 20
    logit_mask: LogitMask | None = None


@dataclass(frozen=True)
class _Tiles:
    """How [rows, vocabulary] is cut: `columns` outside, `rows` inside; the last `kept` are for the backward.

    A tile reads and writes its rows of one gradient and its columns of the other, so it is as high as wide where memory
    allows more than few rows.
    """

    columns: list[slice]
    rows: list[slice]
    kept: int

    @staticmethod
    def of(rows: int, columns: int, element_size: int, memory_bytes: int) -> _Tiles:
        numbers = memory_bytes // (_TILES_AT_ONE_TIME * element_size)
        parts = math.ceil(rows / max(_ENOUGH_ROWS, math.isqrt(numbers)))
        height = math.ceil(rows / max(parts, 1)) or 1
        width = max(numbers // height, 1)
        width -= width % _WIDTH_STEP if width > _WIDTH_STEP else 0
        kept = max(memory_bytes // (element_size * height * width) - 1, 0)
        return _Tiles(_slices(columns, width), _slices(rows, height) or [slice(0, 0)], kept)

    def is_kept(self, strip: int, part: int) -> bool:
        """Whether rows `part` of columns `strip` are among the last."""
        return (len(self.columns) - strip) * len(self.rows) - part <= self.kept


class _VocabParallelLogProbs(torch.autograd.Function):
    """hidden [R, H], weight [≥ V_local, H] → log-probs and entropies, float32 [2, R].

    The gradient of `hidden` is this rank's part of the sum over tensor parallel ranks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        first_id: int,
        vocab_size: int,
        group: dist.ProcessGroup,
        temperature: float,
        memory_bytes: int,
        logit_mask: LogitMask | None,
        keep: bool,
        fuse: bool,
    ) -> torch.Tensor:
        tiles = _Tiles.of(len(hidden), vocab_size, hidden.element_size(), memory_bytes)
        local = targets - first_id
        # Of each strip of the vocabulary: the largest logit, Σ e, Σ e·z with z the logit above the largest one.
        accurate = torch.promote_types(hidden.dtype, torch.float32)
        strips = hidden.new_zeros(3, max(len(tiles.columns), 1), len(hidden), dtype=accurate)
        if not tiles.columns:
            strips[0] = -torch.inf
        target = hidden.new_zeros(len(hidden), dtype=accurate)
        ctx.kept, ctx.on_tile = {}, operations(hidden.device)
        for number, columns in enumerate(tiles.columns):
            for part, rows in enumerate(tiles.rows):
                tile = _logits(hidden, weight, rows, columns, first_id, logit_mask)
                is_kept = keep and tiles.is_kept(number, part)
                if is_kept:
                    ctx.kept[number, part] = tile
                column, statistics = local[rows] - columns.start, strips[:, number, rows]
                ctx.on_tile.softmax_statistics(tile, column, temperature, statistics, target[rows], kept=is_kept)
        peak = strips[0].amax(dim=0)
        if group.size() > 1:
            dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
        below = strips[0] - peak
        share = below.exp()
        # A rank whose shard is all padding has one strip of −inf, which weighs nothing.
        lowered = torch.where(share > 0, strips[2] + strips[1] * below, 0.0)
        sums = torch.stack([(share * strips[1]).sum(0), (share * lowered).sum(0), target])
        if group.size() > 1:
            dist.all_reduce(sums, group=group)
        log_total = sums[0].log()
        log_sum = log_total + peak
        answer = torch.stack([sums[2] - log_sum, log_total - sums[1] / sums[0]])
        ctx.save_for_backward(hidden, weight, local, log_sum, answer[1])
        ctx.tiles, ctx.temperature, ctx.fuse = tiles, temperature, fuse
        ctx.first_id, ctx.logit_mask = first_id, logit_mask
        return answer

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, local, log_sum, entropy = ctx.saved_tensors
        gradient = (gradient / ctx.temperature).contiguous()
        wants_entropy = bool(gradient[1].any()) if gradient.device.type == "cpu" else True
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        hidden_gradient = torch.zeros_like(hidden, dtype=log_sum.dtype) if wants_hidden else None
        weight_gradient = None
        main_grad = getattr(weight, "main_grad", None) if ctx.fuse and wants_weight else None
        if wants_weight:
            # Beside `main_grad` this is a token for autograd alone: never written, on the host it never takes memory.
            weight_gradient = torch.empty_like(weight)
            if main_grad is not None:
                marks(weight).grad_added_to_main_grad = True
            else:
                weight_gradient[ctx.tiles.columns[-1].stop if ctx.tiles.columns else 0 :] = 0
        for number, columns in enumerate(ctx.tiles.columns):
            total = None
            for part, rows in enumerate(ctx.tiles.rows):
                tile = ctx.kept.pop((number, part), None)
                if tile is None:
                    tile = _logits(hidden, weight, rows, columns, ctx.first_id, ctx.logit_mask)
                ctx.on_tile.logit_gradient_(
                    tile,
                    local[rows] - columns.start,
                    ctx.temperature,
                    log_sum[rows],
                    gradient[:, rows],
                    entropy[rows] if wants_entropy else None,
                )
                if hidden_gradient is not None:
                    _add_product(hidden_gradient[rows], tile, weight[columns])
                if weight_gradient is None:
                    continue
                if main_grad is not None:
                    _add_product(main_grad[columns], tile.t(), hidden[rows])
                elif len(ctx.tiles.rows) == 1:
                    torch.mm(tile.t(), hidden, out=weight_gradient[columns])
                else:
                    if total is None:
                        total = hidden.new_zeros(tile.shape[1], hidden.shape[1], dtype=log_sum.dtype)
                    _add_product(total, tile.t(), hidden[rows])
            if total is not None and weight_gradient is not None:
                weight_gradient[columns] = total
        if hidden_gradient is not None:
            hidden_gradient = hidden_gradient.to(hidden.dtype)
        return hidden_gradient, weight_gradient, *[None] * 9


def _slices(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _logits(
    hidden: torch.Tensor, weight: torch.Tensor, rows: slice, columns: slice, first_id: int, logit_mask: LogitMask | None
) -> torch.Tensor:
    """One tile, [rows, columns]."""
    tile = hidden[rows] @ weight[columns].t()
    if logit_mask is not None:
        logit_mask.apply_(tile, rows, first_id + columns.start)
    return tile


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """`total += left @ right`, summed in `total`'s dtype."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.device.type != "cpu":  # wants PyTorch 2.10
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.add_(left @ right)


def operations(device: torch.device) -> ModuleType:
    """The module that works on tiles there: `triton_tiles` where a GPU and Triton are, `logit_tiles` elsewhere."""
    if has_triton(device.type):
        from vespo_megatron.megatron import triton_tiles

        return triton_tiles
    return logit_tiles


def vocab_parallel_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    first_id: int,
    group: dist.ProcessGroup,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    memory_bytes: int = 64 << 20,
    logit_mask: LogitMask | None = None,
    fuse_gradient_accumulation: bool = False,
) -> torch.Tensor:
    """Log-probs of `targets` and entropies, of the full distribution or of what `logit_mask` leaves of it.

    Args:
        hidden: [R, hidden_size], the same on every tensor parallel rank.
        weight: [rows, hidden_size], this rank's rows of the output embedding.
        targets: int64 [R].
        first_id: token id of the shard's first row.
        group: tensor parallel group.
        vocab_size: how many of the shard's rows are real; None: all. The others take no part.
        memory_bytes: what logits may take at one time, those that are kept for the backward included.
        logit_mask: token ids that take no part, row by row; every target does. None: all take part.
        fuse_gradient_accumulation: add the weight's gradient to `weight.main_grad` and give autograd a tensor that is
            not initialised (megatron-core's `grad_added_to_main_grad`: layers.py:610). Not for a weight used twice.

    Returns:
        float32 [2, R] (float64 for float64 input): log-probs, entropies (nats).
    """
    real = weight.shape[0] if vocab_size is None else vocab_size
    keep = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _VocabParallelLogProbs.apply(
        hidden,
        weight,
        targets,
        first_id,
        real,
        group,
        temperature,
        memory_bytes,
        logit_mask,
        keep,
        fuse_gradient_accumulation,
    )
