"""Transport `distributed`: one broadcast per bucket to a group of the trainer's rank 0 and every rank of the servers.

gloo where buckets are on the host, NCCL on GPUs (run there with one rank only). The post that announces a bucket runs in a
thread: a server that refuses never joins the broadcast, and its refusal ends the wait at once.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vespo_megatron.errors import UserError
from vespo_megatron.rollout_sglang.client.fan_out import PendingCall, raise_failures
from vespo_megatron.rollout_sglang.weight_sync.buckets import Bucket, Wait
from vespo_megatron.rollout_sglang.weight_sync.servers import Servers

if TYPE_CHECKING:
    import torch

    from vespo_megatron.rollout_sglang.weight_sync.broadcast_group import BroadcastGroup


class DistributedTransport:
    """See `transport.Transport`.

    Args:
        device: where buckets live; "cpu" is gloo, "cuda" is NCCL.
    """

    opens_session = True

    def __init__(self, device: str) -> None:
        self.device = device
        self.group: BroadcastGroup | None = None

    def connect(self, servers: Servers, ranks: Sequence[int]) -> None:
        """Servers are invited in their order, each with its block of ranks; all join within the servers' deadline."""
        from vespo_megatron.rollout_sglang.weight_sync.broadcast_group import BroadcastGroup, local_address_towards

        self._servers = servers
        name = f"vespo-{uuid.uuid4().hex[:8]}"
        address = local_address_towards(servers.clients[0].url)
        backend = "nccl" if self.device == "cuda" else "gloo"
        world_size = 1 + sum(ranks)
        posts: list[PendingCall[Any]] = []

        def invite(port: int) -> None:
            offset = 1
            for client, size in zip(servers.clients, ranks, strict=True):
                body = {
                    "master_address": address,
                    "master_port": port,
                    "rank_offset": offset,
                    "world_size": world_size,
                    "group_name": name,
                    "backend": backend,
                }
                posts.append(servers.post(client, "/init_weights_update_group", body))
                offset += size

        self.group = BroadcastGroup.join(
            name=name,
            backend=backend,
            master_address=address,
            world_size=world_size,
            timeout_s=servers.timeout_s,
            invite=invite,
            failed=lambda: raise_failures(posts),
        )
        servers.wait(posts)

    def begin(self, version: int) -> None:
        """Nothing to prepare."""

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """On the device whose backend sends it."""
        import torch

        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def send(self, bucket: Bucket) -> Wait:
        """One announcement per server, one broadcast to all."""
        assert self.group is not None
        servers = self._servers
        body = {
            "names": bucket.names,
            "dtypes": bucket.dtypes,
            "shapes": bucket.shapes,
            "group_name": self.group.name,
            "load_format": "flattened_bucket",
            "selector": "target",
            "flush_cache": False,
        }
        posts = servers.start("/update_weights_from_distributed", body)
        work = self.group.broadcast(bucket.flat, lambda: raise_failures(posts))

        def wait() -> None:
            deadline = time.monotonic() + servers.timeout_s
            while not work.is_completed():
                raise_failures(posts)
                if time.monotonic() > deadline:
                    raise UserError(f"a bucket was not taken within {servers.timeout_s:g} s", where="weight update")
                time.sleep(0.0002)
            try:
                work.wait()
            except RuntimeError as error:
                raise_failures(posts)
                raise UserError(f"the broadcast failed: {str(error).splitlines()[0]}", where="weight update") from error
            servers.wait(posts)

        return wait

    def finish(self) -> None:
        """Every bucket is loaded when its post is answered."""

    def disconnect(self) -> None:
        """Leave the group and tell the servers to."""
        group, self.group = self.group, None
        if group is None:
            return
        for client in self._servers.clients:
            with contextlib.suppress(UserError):
                client.call("/destroy_weights_update_group", {"group_name": group.name}, timeout_s=2.0)
        group.close()
