"""Control calls to every server of an update side by side, each with a deadline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from vespo_megatron.rollout_sglang.client.client import SGLangClient


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

    def post(self, client: SGLangClient, path: str, body: dict[str, Any]) -> Future[Any]:
        """Start one call."""
        return self._pool.submit(client.call, path, body, timeout_s=self.timeout_s)

    def start(self, path: str, body: dict[str, Any]) -> list[Future[Any]]:
        """Start the same call to each."""
        return [self.post(client, path, body) for client in self.clients]

    def post_all(self, path: str, body: dict[str, Any]) -> None:
        """The same call to each; returns when all have answered, raises the first failure."""
        self.wait(self.start(path, body))

    def on_all(self, function: Callable[[SGLangClient], Any]) -> list[Any]:
        """`function` of each, side by side."""
        futures = [self._pool.submit(function, client) for client in self.clients]
        return [future.result(self.timeout_s + 10) for future in futures]

    def wait(self, posts: Sequence[Future[Any]]) -> None:
        """Return when all are answered; raises the first failure."""
        for post in posts:
            post.result(self.timeout_s + 10)

    def close(self) -> None:
        """Take no more calls; what is under way ends by its deadline."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def raise_failed(posts: Sequence[Future[Any]]) -> None:
    """Raise the first failure among posts that are already answered."""
    for post in posts:
        if post.done() and post.exception() is not None:
            raise post.exception()  # type: ignore[misc]
