"""Token log-probs (and entropy) from hidden states, vocab-parallel, without ever keeping tokens × vocabulary.

The forward makes the logits of a chunk of tokens, reduces them to one number per token and drops them; the backward
makes them again, chunk by chunk, and turns them into gradients. That is one more matrix product than the plain form
(4/3 of its work) and keeps [chunk, vocabulary / TP] instead of [tokens, vocabulary / TP], several times over.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class LogProbRequest:
    """Which log-probs are wanted. Shapes: R rows out of this rank's T tokens.

    `rows` int64 [R] into the T tokens (after sequence parallel gathering), `targets` int64 [R] token ids whose
    log-probability each row gives, `temperature` divides the logits.
    """

    rows: torch.Tensor
    targets: torch.Tensor
    temperature: float = 1.0
    chunk_tokens: int = 1024


class _VocabParallelLogProbs(torch.autograd.Function):
    """hidden [R, H], weight [V / TP, H] → log-probs and entropies, float32 [2, R].

    The gradient of `hidden` is this rank's part of the sum over tensor parallel ranks.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, first_id, group, temperature, chunk_tokens):
        local = targets - first_id
        in_shard = (local >= 0) & (local < weight.shape[0])
        local = local.clamp(0, weight.shape[0] - 1)
        log_probs = hidden.new_empty(2, hidden.shape[0], dtype=torch.float32)
        log_sum = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        for chunk in _chunks(hidden.shape[0], chunk_tokens):
            logits = _logits(hidden[chunk], weight, temperature)
            peak = logits.amax(dim=-1) if weight.shape[0] else logits.new_full((len(logits),), -torch.inf)
            if group.size() > 1:
                dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
            target = logits.gather(-1, local[chunk, None]).squeeze(-1).masked_fill(~in_shard[chunk], 0.0)
            logits -= peak[:, None]
            weights = logits.exp()
            sums = torch.stack([weights.sum(-1), (weights * logits).sum(-1), target])
            if group.size() > 1:
                dist.all_reduce(sums, group=group)
            log_total = sums[0].log()
            log_sum[chunk] = log_total + peak
            log_probs[0, chunk] = sums[2] - log_sum[chunk]
            log_probs[1, chunk] = log_total - sums[1] / sums[0]
        ctx.save_for_backward(hidden, weight, local, in_shard, log_sum, log_probs[1])
        ctx.temperature, ctx.chunk_tokens = temperature, chunk_tokens
        return log_probs

    @staticmethod
    def backward(ctx, gradient):
        hidden, weight, local, in_shard, log_sum, entropy = ctx.saved_tensors
        hidden_gradient = torch.empty_like(hidden)
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32)
        wants_entropy = bool(gradient[1].any()) if gradient.device.type == "cpu" else True
        for chunk in _chunks(hidden.shape[0], ctx.chunk_tokens):
            log_p = _logits(hidden[chunk], weight, ctx.temperature).sub_(log_sum[chunk, None])
            p = log_p.exp()
            if wants_entropy:
                log_p.add_(entropy[chunk, None]).mul_(gradient[1, chunk, None]).add_(gradient[0, chunk, None])
                slope = p.mul_(log_p).neg_()
            else:
                slope = p.mul_(gradient[0, chunk, None]).neg_()
            slope.scatter_add_(-1, local[chunk, None], (gradient[0, chunk] * in_shard[chunk])[:, None])
            slope = slope.div_(ctx.temperature).to(weight.dtype)
            torch.mm(slope, weight, out=hidden_gradient[chunk])
            weight_gradient += slope.t() @ hidden[chunk]
        return hidden_gradient, weight_gradient.to(weight.dtype), None, None, None, None, None


def _chunks(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _logits(hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = (hidden @ weight.t()).float()
    return logits if temperature == 1.0 else logits.div_(temperature)


def vocab_parallel_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    first_id: int,
    group: dist.ProcessGroup,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> torch.Tensor:
    """Log-probs of `targets` and entropies of the full distribution.

    Args:
        hidden: [R, hidden_size], the same on every tensor parallel rank.
        weight: [V_local, hidden_size], this rank's rows of the output embedding, real vocabulary only.
        targets: int64 [R].
        first_id: token id of the shard's first row.
        group: tensor parallel group.

    Returns:
        float32 [2, R]: log-probs, entropies (nats).
    """
    return _VocabParallelLogProbs.apply(hidden, weight, targets, first_id, group, temperature, chunk_tokens)
