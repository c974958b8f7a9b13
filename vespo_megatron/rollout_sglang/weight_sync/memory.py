"""Colocated mode: servers give device memory back while the trainer trains, and take it again for the next weights.

SGLang frees what `--enable-memory-saver` allocated: weights and KV cache, by tag. Their contents are lost, so weights
come back with a whole update. Weights are taken back before it and the KV cache after it, when the trainer's buckets
are gone: the two are never on the device together with them. On a CPU SGLang 0.5.23 has no memory saver (the flag
needs the package torch_memory_saver and CUDA): both endpoints answer, and free nothing. Not run on a GPU.
"""

from __future__ import annotations

from vespo_megatron.rollout_sglang.client.client import SGLangClient
from vespo_megatron.rollout_sglang.weight_sync.servers import Servers

_REST = ["kv_cache", "cuda_graph"]


class SharedMemory:
    """Which servers have released their memory. One that was started anew since holds its own and is not told."""

    def __init__(self) -> None:
        self._starts: dict[str, object] = {}
        self._lacking_rest: set[str] = set()

    def release(self, servers: Servers) -> None:
        """The servers must be paused. Those that have released already are not asked again."""

        def release(client: SGLangClient) -> None:
            if client.url not in self._starts and client.url not in self._lacking_rest:
                start = _start(client)
                client.call("/release_memory_occupation", {}, timeout_s=servers.timeout_s)
                self._starts[client.url] = start

        servers.on_all(release)

    def resume_weights(self, servers: Servers) -> None:
        """Room for weights, whatever is in it."""

        def resume(client: SGLangClient) -> None:
            start = self._starts.pop(client.url, None)
            if start is not None and start == _start(client):
                client.call("/resume_memory_occupation", {"tags": ["weights"]}, timeout_s=servers.timeout_s)
                self._lacking_rest.add(client.url)

        servers.on_all(resume)

    def resume_rest(self, servers: Servers) -> None:
        """The KV cache, and graphs."""

        def resume(client: SGLangClient) -> None:
            if client.url in self._lacking_rest:
                client.call("/resume_memory_occupation", {"tags": _REST}, timeout_s=servers.timeout_s)
                self._lacking_rest.discard(client.url)

        servers.on_all(resume)


def _start(client: SGLangClient) -> object:
    """What tells one life of a server from the next."""
    return client.server_info().get("startup_time", 0)
