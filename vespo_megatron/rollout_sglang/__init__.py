"""Rollouts: the SGLang client, server launch, weight sync, CPU platform plugin; and the in-process engine."""

from __future__ import annotations

from typing import Any

__all__ = ["ServerGroup", "connect", "launch_servers"]


def __getattr__(name: str) -> Any:
    """Loaded when first used: SGLang's processes import this package for its plugins alone."""
    if name in ("ServerGroup", "launch_servers"):
        from vespo_megatron.rollout_sglang.server import server_group

        return getattr(server_group, name)
    if name == "connect":
        from vespo_megatron.rollout_sglang.sglang_engine import connect

        return connect
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
