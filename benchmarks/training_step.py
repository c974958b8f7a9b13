"""A training step as the trainer makes it, of one rank: what several benchmarks time."""

from __future__ import annotations


def train_step(batch, recipe, policy, objective) -> None:
    """Pack, slice, update and sum up the metrics. Every rank has the whole rollout batch."""
    from vespo_megatron.megatron.micro_batch import prepare
    from vespo_megatron.trainer.scatter import plan_shares

    place = policy.place
    share = plan_shares(batch, recipe, place.data_size, policy.shape)[place.data_rank]
    for batches, normalizer in zip(share.mini_batches, share.normalizers, strict=True):
        micro_batches = prepare(
            batches, place, temperature=1.0, log_prob_bytes=recipe.policy.megatron_cfg.logprob_memory_mb << 20
        )
        result = policy.update(micro_batches, objective.loss_function(normalizer))
        objective.metrics(result.reports).finalize()
