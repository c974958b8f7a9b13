"""Factory of the weight sync that a recipe asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.schema import SGLangConfig
from vespo_megatron.rollout_sglang.client.client import SGLangClient
from vespo_megatron.rollout_sglang.weight_sync.session import WeightSync
from vespo_megatron.rollout_sglang.weight_sync.transport import Transport

# A transport's module is imported when it is wanted: it needs torch, which whoever only speaks to servers does without.


def _distributed(config: SGLangConfig, device: str) -> Transport:  # noqa: ARG001  (the table's signature)
    from vespo_megatron.rollout_sglang.weight_sync.distributed import DistributedTransport

    return DistributedTransport(device)


def _tensor(config: SGLangConfig, device: str) -> Transport:  # noqa: ARG001  (the table's signature)
    from vespo_megatron.rollout_sglang.weight_sync.tensor import TensorTransport

    return TensorTransport(device)


def _disk(config: SGLangConfig, device: str) -> Transport:  # noqa: ARG001  (the table's signature)
    from vespo_megatron.rollout_sglang.weight_sync.disk import DiskTransport

    if not config.weight_folder:
        raise UserError(
            "has no value",
            where="policy.generation.sglang_cfg.weight_folder",
            expected="a folder that trainer and servers share, for weight_transport disk",
        )
    return DiskTransport(config.weight_folder)


TRANSPORTS: dict[str, Callable[[SGLangConfig, str], Transport]] = {
    "distributed": _distributed,
    "tensor": _tensor,
    "disk": _disk,
}
"""By `weight_transport`: what makes one, given the recipe's keys and the device of the trainer's weights."""


def make_sync(config: SGLangConfig, clients: Sequence[SGLangClient], device: str) -> WeightSync:
    """Nothing is connected yet.

    Args:
        device: "cuda" or "cpu", where the trainer's weights are.

    Raises `UserError` for transport `disk` without a folder.
    """
    return WeightSync(
        clients,
        TRANSPORTS[config.weight_transport](config, device),
        bucket_bytes=max(1, config.weight_bucket_bytes - config.weight_piece_bytes),
        only_changed=config.weight_sync_only_changed,
        timeout_s=config.weight_update_timeout,
    )
