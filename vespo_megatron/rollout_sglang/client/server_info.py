"""What a server says of itself (`/server_info`), as far as it is used here, each field of its type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vespo_megatron.rollout_sglang.client.check import Check


@dataclass(frozen=True)
class ServerInfo:
    """One server's; None where it does not say."""

    version: str | None
    """Of SGLang."""
    startup_time: object
    """Anything (SGLang 0.5.23: the length of each phase of its start). Another value is another process, with other
    weights."""
    device: str
    context_length: int | None
    returns_routes: bool
    replicas: int
    """Data parallel times pipeline parallel."""

    @classmethod
    def read(cls, check: Check, reply: Any) -> ServerInfo:
        """Out of a reply. Raises as `Check`."""
        info = check.dictionary(reply, "reply")

        def number(name: str) -> int | None:
            return None if info.get(name) is None else check.whole_number(info[name], name)

        return cls(
            version=None if info.get("version") is None else check.text(info["version"], "version"),
            startup_time=info.get("startup_time", 0),
            device=check.text(info.get("device", "cuda"), "device"),
            context_length=number("context_length"),
            returns_routes=info.get("enable_return_routed_experts", True) is True,
            replicas=(number("dp_size") or 1) * (number("pp_size") or 1),
        )
