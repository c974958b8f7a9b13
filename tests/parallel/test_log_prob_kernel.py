"""`vocab_parallel_log_probs` against plain log-softmax in float64: values, entropies and every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from vespo_megatron.megatron.logprobs import vocab_parallel_log_probs


def sharded(store: str, chunk_tokens: int, rows: int, dtype: torch.dtype) -> dict:
    """One tensor parallel rank's share, put together again."""
    dist.init_process_group("gloo", init_method=store, rank=int(__import__("os").environ["RANK"]),
                            world_size=int(__import__("os").environ["WORLD_SIZE"]))  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 12, generator=generator, dtype=torch.float64)
    weight = torch.randn(50, 12, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 50, (rows,), generator=generator)
    gradient = torch.randn(2, rows, generator=generator, dtype=torch.float64)

    plain_hidden, plain_weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    distribution = (plain_hidden @ plain_weight.t() / 0.7).log_softmax(-1)
    plain = torch.stack([distribution.gather(-1, targets[:, None])[:, 0], -(distribution.exp() * distribution).sum(-1)])
    plain.backward(gradient)

    rank, size = dist.get_rank(), dist.get_world_size()
    bounds = [0, 37, 50] if size == 2 else [0, 50]  # shards of unequal size, as at the end of a padded vocabulary
    ours_hidden = hidden.to(dtype).requires_grad_()
    ours_weight = weight[bounds[rank] : bounds[rank + 1]].to(dtype).requires_grad_()
    ours = vocab_parallel_log_probs(
        ours_hidden, ours_weight, targets, first_id=bounds[rank], group=dist.group.WORLD, temperature=0.7,
        chunk_tokens=chunk_tokens,
    )  # fmt: skip
    ours.backward(gradient.float())
    hidden_gradient = ours_hidden.grad.double()
    dist.all_reduce(hidden_gradient)
    return {
        "values": (ours.double() - plain).abs().max().item() if rows else 0.0,
        "hidden": (hidden_gradient - plain_hidden.grad).abs().max().item() if rows else 0.0,
        "weight": (ours_weight.grad.double() - plain_weight.grad[bounds[rank] : bounds[rank + 1]]).abs().max().item(),
    }


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("chunk_tokens", "rows"), [(4, 10), (64, 10), (4, 0)])
def test_log_probs_entropies_and_gradients_are_exact(world_size, chunk_tokens, rows, workers):
    for errors in workers.run(sharded, world_size, chunk_tokens=chunk_tokens, rows=rows, dtype=torch.float32):
        assert max(errors.values()) < 2e-5, errors
