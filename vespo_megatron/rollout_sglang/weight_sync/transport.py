"""Protocol of the transports, whose steps a session goes through, and what they share."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from vespo_megatron.errors import UserError
from vespo_megatron.rollout_sglang.faults import ServerFault
from vespo_megatron.rollout_sglang.plugin.actions import SEES
from vespo_megatron.rollout_sglang.weight_sync.buckets import Bucket, Wait
from vespo_megatron.rollout_sglang.weight_sync.servers import Servers
from vespo_megatron.rollout_sglang.weight_sync.weights_checker import ask_weights

if TYPE_CHECKING:
    import torch


class Transport(Protocol):
    """How buckets get into the servers. `connect` once, then per update `begin`, `send`…, `finish`; `disconnect`."""

    opens_session: bool
    """Whether its endpoint answers only between `/begin_weight_update` and `/end_weight_update`."""

    def connect(self, servers: Servers, ranks: Sequence[int]) -> None:
        """Reach exactly these servers, which have so many ranks; raises `UserError` when that is impossible."""

    def begin(self, version: int) -> None:
        """An update to this version begins."""

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """uint8 [num_bytes], a buffer to send from."""

    def send(self, bucket: Bucket) -> Wait:
        """Start one bucket on its way; the returned function waits for it. Tests inject corruption here."""

    def finish(self) -> None:
        """All buckets were sent; returns when the servers have loaded them."""

    def disconnect(self) -> None:
        """Let go of what `connect` and `allocate` made; idempotent, never raises."""


def check_shared(servers: Servers, folder: str, *, fix: str) -> None:
    """Raise `ServerFault` for the first server that does not see what this process writes in `folder`.

    Raises `UserError` when this process cannot write there.
    """
    probe = Path(folder) / f"vespo-{uuid.uuid4().hex}.probe"
    try:
        probe.touch()
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror})", where=folder, fix=fix) from error
    try:
        for client in servers.clients:
            ranks = ask_weights(client, f"{SEES} {probe}", servers.timeout_s)
            if not all(rank["sees"] == "yes" for rank in ranks):
                raise ServerFault(f"does not see the trainer's {folder}", url=client.url, fix=fix)
    finally:
        probe.unlink(missing_ok=True)
