"""Factory of the weight sync that a recipe asks for."""

from __future__ import annotations

from collections.abc import Sequence

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.schema import SGLangConfig
from vespo_megatron.rollout_sglang.client.client import SGLangClient
from vespo_megatron.rollout_sglang.weight_sync.session import WeightSync
from vespo_megatron.rollout_sglang.weight_sync.transport import Transport


def make_sync(config: SGLangConfig, clients: Sequence[SGLangClient], device: str) -> WeightSync:
    """Nothing is connected yet.

    Args:
        device: "cuda" or "cpu", where the trainer's weights are.

    Raises `UserError` for transport `disk` without a folder.
    """
    return WeightSync(
        clients,
        _transport(config, device),
        bucket_bytes=max(1, config.weight_bucket_bytes - config.weight_piece_bytes),
        only_changed=config.weight_sync_only_changed,
    )


def _transport(config: SGLangConfig, device: str) -> Transport:
    # Each is imported when it is wanted: they need torch, which whoever only speaks to servers does without.
    if config.weight_transport == "tensor":
        from vespo_megatron.rollout_sglang.weight_sync.tensor import TensorTransport

        return TensorTransport(device)
    if config.weight_transport == "disk":
        from vespo_megatron.rollout_sglang.weight_sync.disk import DiskTransport

        if not config.weight_folder:
            raise UserError(
                "has no value",
                where="policy.generation.sglang_cfg.weight_folder",
                expected="a folder that trainer and servers share, for weight_transport disk",
            )
        return DiskTransport(config.weight_folder)
    from vespo_megatron.rollout_sglang.weight_sync.distributed import DistributedTransport

    return DistributedTransport(device)
