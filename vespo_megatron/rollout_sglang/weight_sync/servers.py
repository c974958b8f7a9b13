"""Control calls to every server of an update side by side, each with a deadline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from vespo_megatron.rollout_sglang.client.client import SGLangClient
from vespo_megatron.rollout_sglang.client.fan_out import PendingCall, replies

T = TypeVar("T")


class Servers:
    """The servers of one `WeightSync`.

    Args:
        clients: at least one.
        timeout_s: deadline of each call.
    """

    def __init__(self, clients: Sequence[SGLangClient], timeout_s: float) -> None:
        self.clients, self.timeout_s = list(clients), timeout_s
        # Two posts may be under way to each server: the next bucket is announced before the last one is answered.
        self._pool = ThreadPoolExecutor(max(4, 2 * len(self.clients)), thread_name_prefix="weight-sync")

    def post(self, client: SGLangClient, path: str, body: dict[str, Any]) -> PendingCall[Any]:
        """Start one call."""
        return PendingCall(client.url, self._pool.submit(client.call, path, body, timeout_s=self.timeout_s))

    def start(self, path: str, body: dict[str, Any]) -> list[PendingCall[Any]]:
        """Start the same call to each."""
        return [self.post(client, path, body) for client in self.clients]

    def post_all(self, path: str, body: dict[str, Any]) -> None:
        """The same call to each; returns when all have answered, raises as `fan_out.replies`."""
        self.wait(self.start(path, body))

    def on_all(self, function: Callable[[SGLangClient], T]) -> list[T]:
        """`function` of each, side by side, in order; raises as `fan_out.replies`."""
        calls = [PendingCall(client.url, self._pool.submit(function, client)) for client in self.clients]
        return replies(calls, self.timeout_s + 10)

    def wait(self, posts: Sequence[PendingCall[Any]]) -> None:
        """Return when all are answered; raises as `fan_out.replies`."""
        replies(posts, self.timeout_s + 10)

    def close(self) -> None:
        """Take no more calls; what is under way ends by its deadline."""
        self._pool.shutdown(wait=False, cancel_futures=True)
