"""A training step as the trainer makes it, of one rank: what several benchmarks time."""

from __future__ import annotations


def train_step(batch, recipe, policy, objective) -> None:
    """Pack, slice, update and sum up the metrics. Every rank has the whole rollout batch."""
    from vespo_megatron.megatron.micro_batch import prepare
    from vespo_megatron.trainer.scatter import plan_shards

    rank_info = policy.rank_info
    share = plan_shards(batch, recipe, rank_info.data_size, policy.shape)[rank_info.data_rank]
    for batches, normalizer in zip(share.mini_batches, share.normalizers, strict=True):
        micro_batches = prepare(
            batches, rank_info, temperature=1.0, log_prob_bytes=recipe.policy.megatron_cfg.logprob_memory_mb << 20
        )
        result = policy.update(micro_batches, objective.loss_function(normalizer))
        objective.metrics(result.reports).finalize()
