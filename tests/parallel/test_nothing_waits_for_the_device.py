"""Inside a micro-batch nothing is read from the device, so that the host can run ahead of a GPU.

Tensors on PyTorch's `meta` device stand for a GPU's: operators give shapes and dtypes, and reading a value is an error.
They take the branches that a GPU takes, so that these have run at least in shape.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist

from vespo_megatron.data.batch import Batch
from vespo_megatron.data.sample import Sample
from vespo_megatron.data.sampling_mask import SamplingMask
from vespo_megatron.errors import UserError
from vespo_megatron.losses import Normalizer, PolicyLossConfig, objective_names

ONLY_WHERE_BATCHES_MEET = ("bapo", "m2po", "clip_cov", "kl_cov")
"""What they search for holds for a whole mini-batch and is settled before it (`Objective.over_mini_batch`)."""
WAITS = ("reading a value", "minpro, rollout", "minpro, recompute")
"""MinPRO asks for the longest response (`Ratios.prefix_min_log_ratio`)."""


def report(store: str) -> dict[str, str]:
    """What failed, by name."""
    from vespo_megatron.megatron import parallel
    from vespo_megatron.megatron.micro_batch import prepare
    from vespo_megatron.recipe.schema import LossConfig, MegatronConfig
    from vespo_megatron.trainer.objective import Objective

    os.environ |= {"LOCAL_RANK": "0"}
    rank_info = parallel.initialize(MegatronConfig(), seed=1, device=torch.device("cpu"), init_method=store)
    rank_info = replace(rank_info, device=torch.device("meta"))
    micro_batch = prepare([batch()], rank_info, temperature=0.9, log_prob_bytes=1000)[0]
    tokens = len(micro_batch.request.rows)
    micro_batch.old_log_probs = micro_batch.ref_log_probs = torch.empty(tokens, device="meta")
    failures: dict[str, str] = {}

    def attempt(name: str, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {error}"

    attempt("reading a value", lambda: micro_batch.advantages.sum().item())
    attempt("log-probs", lambda: log_probs(micro_batch, fuse=False))
    attempt("log-probs into main_grad", lambda: log_probs(micro_batch, fuse=True))
    attempt("experts", experts)
    attempt("attention", lambda: attention(micro_batch))
    normalizer = Normalizer.from_lengths([30, 7, 19, 44])
    for name in objective_names():
        if name in ONLY_WHERE_BATCHES_MEET:
            continue
        for behavior in ("rollout", "recompute"):
            objective = Objective(LossConfig(), "rollout", max_lag=2)
            try:
                objective.config = PolicyLossConfig(
                    name=name, behavior=behavior, kl_coefficient=0.1, entropy_coefficient=0.1
                )
            except UserError:  # an objective that has no meaning without π_old
                continue
            values = torch.empty(2, tokens, device="meta", requires_grad=True)
            function = objective.loss_function(normalizer)
            attempt(f"{name}, {behavior}", lambda f=function, v=values: f(v[0], v[1], micro_batch)[0].backward())
    dist.destroy_process_group()
    return failures


def batch() -> Batch:
    samples = [
        Sample(
            sample_id=str(length),
            prompt_id="0",
            prompt_ids=np.full(5, 3),
            response_ids=np.full(length, 4),
            behavior_log_probs=np.zeros(length),
            weight_versions=np.zeros(length),
            finish_reason="stop",
            sampling_mask=SamplingMask.of([[4, 7]] * length) if length > 20 else None,
        )
        for length in (30, 7, 19, 44)
    ]
    return Batch(samples, np.ones(4, dtype=np.float32), np.zeros(4, dtype=np.int64))


def log_probs(micro_batch, *, fuse: bool) -> None:
    from vespo_megatron.megatron.logprobs import vocab_parallel_log_probs

    hidden = torch.empty(len(micro_batch.request.rows), 16, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight = torch.empty(48, 16, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight.main_grad = torch.empty(48, 16, device="meta")
    assert micro_batch.request.logit_mask is not None
    answer = vocab_parallel_log_probs(
        hidden,
        weight,
        micro_batch.request.targets,
        first_id=0,
        group=dist.group.WORLD,
        vocab_size=45,
        temperature=0.9,
        memory_bytes=1000,
        logit_mask=micro_batch.request.logit_mask,
        fuse_gradient_accumulation=fuse,
    )
    answer.backward(torch.empty_like(answer))
    assert (answer.dtype, hidden.grad.dtype, weight.grad.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)


def experts() -> None:
    from vespo_megatron.megatron.native.experts import _GroupedSwiGLU

    def tensor(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16, device="meta", requires_grad=True)

    x, fc1, fc2 = tensor(64, 32), tensor(4, 48, 32), tensor(4, 32, 24)
    probs = torch.empty(64, device="meta", requires_grad=True)
    output = _GroupedSwiGLU.apply(x, probs, fc1, fc2, torch.full((4,), 16, device="meta"))
    output.sum().backward()
    assert output.shape == x.shape and probs.grad.dtype == torch.float32
    assert all(weight.grad.shape == weight.shape for weight in (fc1, fc2))


def attention(micro_batch) -> None:
    from megatron.core.transformer.enums import AttnMaskType

    from vespo_megatron.megatron.native.attention import PackedAttention

    layer = PackedAttention(
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        pg_collection=SimpleNamespace(cp=dist.group.WORLD),
    )
    tokens = micro_batch.input_ids.shape[1]
    query = torch.empty(tokens, 4, 16, dtype=torch.bfloat16, device="meta", requires_grad=True)
    both = torch.empty(2, tokens, 2, 16, dtype=torch.bfloat16, device="meta", requires_grad=True)
    output = layer(query, both[0], both[1], None, packed_seq_params=micro_batch.packed_seq_params)
    output.sum().backward()
    assert output.shape == (tokens, 64)


def test_a_micro_batch_runs_where_no_value_can_be_read(workers):
    (failures,) = workers.run(report, 1)
    assert all("item() cannot be called" in failures.pop(name) for name in WAITS)
    assert failures == {}
