"""Colocated mode: what of its device memory each server has given back.

SGLang frees what `--enable-memory-saver` allocated, by tag: weights, KV cache and, where the server was started with
`SGLANG_MEMORY_SAVER_CUDA_GRAPH`, CUDA graphs. What was in weights and cache is lost. On a CPU SGLang 0.5.23 has no
memory saver (the flag needs the package torch_memory_saver and CUDA): both endpoints answer, and free nothing.
"""

from __future__ import annotations

from vespo_megatron.rollout_sglang.client.client import SGLangClient

WEIGHTS, CACHE, GRAPHS = "weights", "kv_cache", "cuda_graph"
_ALL = (WEIGHTS, CACHE, GRAPHS)


class SharedMemory:
    """What each server has given back. One that was started anew since has all of its own, and is known by its start.

    Args:
        timeout_s: deadline of each call.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._given: dict[str, tuple[object, frozenset[str]]] = {}

    def release(self, client: SGLangClient) -> None:
        """Take everything that it still holds. It must be paused."""
        start = _start(client)
        given = self._given_back(client, start)
        if held := [tag for tag in _ALL if tag not in given]:
            client.call("/release_memory_occupation", {"tags": held}, timeout_s=self._timeout_s)
            self._given[client.url] = (start, frozenset(_ALL))

    def resume(self, client: SGLangClient, *tags: str) -> None:
        """Give it room for these, whatever is in it then."""
        start = _start(client)
        given = self._given_back(client, start)
        if lacking := [tag for tag in tags if tag in given]:
            client.call("/resume_memory_occupation", {"tags": lacking}, timeout_s=self._timeout_s)
            self._given[client.url] = (start, given - set(lacking))

    def lacks_any(self, client: SGLangClient) -> bool:
        """Whether it cannot serve, as far as is known here."""
        return bool(self._given.get(client.url, (None, frozenset()))[1])

    def _given_back(self, client: SGLangClient, start: object) -> frozenset[str]:
        known, given = self._given.get(client.url, (start, frozenset()))
        return given if known == start else frozenset()


def _start(client: SGLangClient) -> object:
    """What tells one life of a server from the next."""
    return client.server_info().startup_time
