"""What the workers do: build the policy in a layout and return what a test compares."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vespo_megatron.data.batch import Batch
from vespo_megatron.data.sample import Sample
from vespo_megatron.losses import Normalizer
from vespo_megatron.megatron import hf_weights, parallel
from vespo_megatron.megatron.micro_batch import MicroBatch, prepare
from vespo_megatron.megatron.policy import MegatronPolicy
from vespo_megatron.recipe.schema import LossConfig, PolicyConfig
from vespo_megatron.trainer.objective import Objective

# Prompt and response lengths: a single response token, a response longer than any context-parallel chunk of another,
# a prompt longer than its response, and lengths that no parallel size divides.
LENGTHS = ((5, 7), (3, 1), (20, 41), (1, 9), (9, 13), (2, 30), (17, 3), (4, 4), (6, 11), (1, 1), (8, 19), (3, 23), (2, 2),
           (12, 5), (7, 6), (5, 17))  # fmt: skip
VOCAB = 126


def ragged_batch(seed: int = 0) -> Batch:
    """Sixteen samples with behaviour log-probs of a plausible size and advantages of both signs."""
    generator = np.random.default_rng(seed)
    samples = [
        Sample(
            sample_id=f"s{index}",
            prompt_id=f"p{index // 4}",
            prompt_ids=generator.integers(0, VOCAB, prompt),
            response_ids=generator.integers(0, VOCAB, response),
            log_probs=-5 + generator.normal(0, 0.3, response),
            weight_versions=np.zeros(response),
            finish_reason="stop",
            loss_mask=generator.random(response) > 0.1 if response > 1 else None,
        )
        for index, (prompt, response) in enumerate(LENGTHS)
    ]
    return Batch(samples, generator.normal(0, 1, len(samples)).astype(np.float32))


def policy_config(folder: str, layout: dict[str, Any], **changes: Any) -> PolicyConfig:
    config = PolicyConfig(model_name=folder, precision="float32", **changes)
    for name, value in layout.items():
        setattr(config.megatron_cfg, name, value)
    config.megatron_cfg.optimizer.lr = 1e-3
    # Adam's first step is lr · g / (|g| + eps): a small eps turns the rounding of near-zero gradients into full steps.
    config.megatron_cfg.optimizer.adam_eps = 1e-5
    config.megatron_cfg.logprob_chunk_tokens = 16
    config.megatron_cfg.distributed_timeout = 60.0
    return config


def build(folder: str, layout: dict[str, Any], store: str, **changes: Any) -> MegatronPolicy:
    config = policy_config(folder, layout, **changes)
    place = parallel.initialize(config.megatron_cfg, seed=1, device=torch.device("cpu"), init_method=store)
    return MegatronPolicy(config, place)


def micro_batches(policy: MegatronPolicy, batch: Batch, count: int = 4) -> list[MicroBatch]:
    """This data parallel rank's share of the batch in `count` micro-batches."""
    place = policy.place
    mine = list(range(len(batch)))[place.data_rank :: place.data_size]
    return prepare([batch.select(mine[index::count]) for index in range(count)], place, temperature=0.9, chunk_tokens=16)


def weighted_loss(log_probs: torch.Tensor, entropies: torch.Tensor, micro_batch: MicroBatch):
    """−Σ A · log π / D: linear in the log-probs, with each sequence's own advantage."""
    counts = micro_batch.cu_seqlens.diff()
    advantages = micro_batch.advantages.repeat_interleave(counts)
    value = -(log_probs * advantages * micro_batch.mask).sum() / 200
    return value, value.detach().clone()


def gradients_and_update(
    folder: str,
    layout: dict[str, Any],
    store: str,
    loss_fn: LossConfig | None = None,
    behavior: dict[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    """Loss, every gradient and every weight's change in one update, with HF names (rank 0 has them).

    Without `loss_fn` the loss is `weighted_loss`; with it, that objective on samples whose μ is `behavior`.
    """
    policy = build(folder, layout, store)
    before = {name: tensor.clone() for name, tensor in policy.exporter.stream()}
    batch = ragged_batch()
    for sample in batch.samples:
        sample.log_probs = (behavior or {}).get(sample.sample_id, sample.log_probs)
    batches = micro_batches(policy, batch)
    loss = weighted_loss
    if loss_fn is not None:
        lengths = [int(sample.loss_mask.sum()) for sample in batch.samples]
        objective_loss = Objective(loss_fn).loss_function(Normalizer.from_lengths(lengths))

        def loss(log_probs, entropies, micro_batch):
            value, _ = objective_loss(log_probs, entropies, micro_batch)
            return value, value.detach().clone()
    reports = policy.compute_gradients(batches, loss, everywhere=True)
    gradients = {name: tensor.clone() for name, tensor in policy.exporter.stream(lambda parameter: parameter.main_grad)}
    result = policy.update(batches, loss)
    after = {name: tensor.clone() for name, tensor in policy.exporter.stream()}
    share = sum(reports) if reports and policy.place.tensor_rank == 0 else torch.zeros(())
    return {
        "loss": float(share),
        "gradients": gradients,
        "update": {name: after[name] - before[name] for name in after},
        "grad_norm": result.grad_norm,
    }


def log_probs(folder: str, layout: dict[str, Any], store: str) -> list[tuple] | None:
    """(layout, sample ids, [log-probs, entropies]) of each micro-batch of this (data, context) shard."""
    policy = build(folder, layout, store)
    batches = micro_batches(policy, ragged_batch(), count=2)
    outputs = policy.log_probs(batches)
    if not policy.place.reports:
        return None
    return [(batch.layout, [s.sample_id for s in batch.batch.samples], out.numpy()) for batch, out in zip(batches, outputs)]


def round_trip(folder: str, layout: dict[str, Any], store: str, target: str | None = None) -> dict[str, torch.Tensor]:
    """HF → Megatron in this layout → HF (in memory, or as a folder)."""
    policy = build(folder, layout, store)
    if target:
        hf_weights.save(policy.exporter, target, copy_from=folder, shard_bytes=64 << 10)
        return {}
    return {name: tensor.clone() for name, tensor in policy.exporter.stream()}
