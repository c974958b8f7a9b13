"""Health checks of servers that have work: one that shows no sign of life is taken out of service."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from vespo_megatron.rollout_sglang.faults import ServerGone
from vespo_megatron.rollout_sglang.pool.membership import Membership
from vespo_megatron.rollout_sglang.pool.server import PooledServer, ServerState

if TYPE_CHECKING:
    import aiohttp


async def watch_health(membership: Membership, session: aiohttp.ClientSession, timeout_s: float) -> None:
    """Ask for `/health`, which on SGLang 0.5.23 means that its scheduler has answered something; until cancelled.

    Args:
        timeout_s: a server that has work and has not answered for so long is gone; 0 asks nothing.
    """
    if timeout_s > 0:
        await asyncio.gather(*(_watch_one(membership, server, session, timeout_s) for server in membership.serving))


async def _watch_one(
    membership: Membership, server: PooledServer, session: aiohttp.ClientSession, timeout_s: float
) -> None:
    seen = time.monotonic()
    while server.state is ServerState.SERVING:
        await asyncio.sleep(timeout_s / 4)
        if server.in_flight == 0 or await server.client.is_healthy(session, timeout_s=timeout_s / 2):
            seen = time.monotonic()
        elif time.monotonic() - seen > timeout_s:
            fault = ServerGone(
                f"has shown no sign of life for {timeout_s:g} s",
                url=server.url,
                where=f"server {server.url} /health",
                fix="see the server's log, or raise policy.generation.sglang_cfg.health_timeout",
            )
            membership.take_out_of_service(server, fault)
