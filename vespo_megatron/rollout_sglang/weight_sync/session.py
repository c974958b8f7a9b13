"""One update of the servers' weights, from pause to resume, and the checksum that ends it.

1. pause: what runs is aborted, what comes waits;
2. `/begin_weight_update`, for the transports that need it;
3. the stream, bucket by bucket, however the transport sends them;
4. `/end_weight_update`;
5. the checksum: what the servers now hold against what was streamed (`plugin/weights.py` says how and why);
6. flush the prefix cache, stamp the version, resume.

Servers that had given their memory back (`memory`) get room for weights before 2, and stay paused after 5: what the
trainer streams from is still on their device. `resume_memory` gives them cache and graphs back, and lets them serve.

A failure anywhere leaves the servers paused: a server answers again only with weights that were checked. The next
`update` connects anew, and sends everything. When the checksums differ, the first time is `WeightsNeeded`: the caller
streams once more, over a new group. The second time in a row is an error that names server, rank and tensors.

Memory on the trainer is two buffers, one filled while the other is under way, and what the stream holds of its own. The
recipe's `weight_bucket_bytes` is half of it all. Only a tensor larger than a buffer takes more: a buffer of its own.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from vespo_megatron.errors import UserError
from vespo_megatron.rollout_sglang.checksum import WeightChecksum, tensor_checksum
from vespo_megatron.rollout_sglang.client.client import SGLangClient
from vespo_megatron.rollout_sglang.faults import ChecksumMismatch, ServerFault, WeightsNeeded, as_one_error
from vespo_megatron.rollout_sglang.plugin.actions import CHECKSUM, MANIFEST
from vespo_megatron.rollout_sglang.weight_sync.buckets import BucketSender
from vespo_megatron.rollout_sglang.weight_sync.manifest import ServedTensor, merge_manifests
from vespo_megatron.rollout_sglang.weight_sync.memory import CACHE, GRAPHS, WEIGHTS, SharedMemory
from vespo_megatron.rollout_sglang.weight_sync.servers import Servers
from vespo_megatron.rollout_sglang.weight_sync.transport import Transport
from vespo_megatron.rollout_sglang.weight_sync.weights_checker import ask_weights

if TYPE_CHECKING:
    import torch

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
Checksums = dict[tuple[str, str], int]
"""By name and slice, for instance `("lm_head.weight", "0:64,0:32")`."""


_ONCE = ("/end_weight_update", "/freeze_gc")
"""To a server that joins, whether it can or not: end a session that an earlier failure left open; and leave what is
loaded out of garbage collections, in which SGLang 0.5.23 stands still."""


class WeightSync:
    """Rank 0's side, towards every server at once. Not thread-safe.

    Args:
        clients: the servers.
        transport: how buckets get there.
        bucket_bytes: size of each of the two buffers.
        only_changed: send only the tensors whose checksum is another than the servers are known to hold.
        timeout_s: deadline of each wait: joining, one bucket, the checksum.
    """

    def __init__(
        self,
        clients: Sequence[SGLangClient],
        transport: Transport,
        *,
        bucket_bytes: int,
        only_changed: bool = False,
        timeout_s: float = 300.0,
    ) -> None:
        self.transport, self.bucket_bytes, self.only_changed = transport, bucket_bytes, only_changed
        self.seconds: dict[str, float] = {}
        """Wall-clock of the last update's parts: stream (with gather and hashing), check, total."""
        self.sent: dict[str, int] = {}
        """`tensors` and `bytes` that the last update sent."""
        self._servers = Servers(clients, timeout_s)
        self._memory = SharedMemory(timeout_s)
        self._connected = False
        self._manifests: list[list[dict[str, str]]] = []
        self._served: dict[str, ServedTensor] = {}
        self._known_checksums: Checksums = {}
        self._differed = False

    @property
    def clients(self) -> list[SGLangClient]:
        """The servers that the next update is for."""
        return self._servers.clients

    @property
    def lacks_memory(self) -> bool:
        """Whether a server waits for `resume_memory`, or for an update before it."""
        return any(self._memory.lacks_any(client) for client in self.clients)

    def update(
        self,
        named_tensors: Iterable[tuple[str, torch.Tensor]],
        version: int,
        *,
        resume: bool = True,
        in_place: bool = False,
    ) -> str:
        """Make the servers hold exactly these tensors under `version`; returns the checksum both sides agree on.

        With `in_place`, requests that run stop where they are and go on afterwards, on the cache of the old weights.
        Servers that had given memory back stay paused until `resume_memory`.

        The servers are left paused by whatever is raised:

        Raises:
            UserError: a tensor that no server has, that is misshapen, sent twice or missing.
            ServerFault: a server refuses or does not answer; `ServersFailed` for several.
            WeightsNeeded: checksums differ; another attempt may succeed.
            ChecksumMismatch: they differ again; `ServersFailed` for several.
        """
        start, servers = time.monotonic(), self._servers
        try:
            servers.on_all(SGLangClient.pause_in_place if in_place else SGLangClient.pause)
            servers.on_all(lambda client: self._memory.resume(client, WEIGHTS))
            self._connect()
            if self.transport.opens_session:
                servers.post_all("/begin_weight_update", {"selector": "target"})
            self.transport.begin(version)
            expected, digest = self._stream(named_tensors, version)
            self.transport.finish()
            if self.transport.opens_session:
                servers.post_all("/end_weight_update", {})
            streamed = time.monotonic()
            self._check(expected, version)
            servers.post_all("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})
            if not self.lacks_memory:
                if not in_place:  # refused while requests run
                    servers.on_all(SGLangClient.flush_cache)
                if resume:
                    servers.on_all(SGLangClient.resume)
        except BaseException:
            self._disconnect()
            raise
        self._known_checksums, self._differed = expected, False
        end = time.monotonic()
        self.seconds = {"stream": streamed - start, "check": end - streamed, "total": end - start}
        return digest

    def set_servers(self, clients: Sequence[SGLangClient]) -> None:
        """From the next update on exactly these are the servers, in a new group: one died, came back or was added.

        Not while an update is under way. Servers that are left out are told to leave the group, if they still answer.
        """
        self._disconnect()
        self._servers.close()
        self._servers = Servers(clients, self._servers.timeout_s)

    def release_memory(self, client: SGLangClient) -> None:
        """Pause any server and take all its memory; `update` brings back its weights, `resume_memory` the rest."""
        client.pause()
        self._known_checksums = {}  # what is released is lost
        self._memory.release(client)

    def resume_memory(self, client: SGLangClient, *, resume: bool = True) -> None:
        """Give a server of the last update its cache and graphs back; with `resume` it serves then."""
        self._memory.resume(client, CACHE, GRAPHS)
        client.flush_cache()
        if resume:
            client.resume()

    def close(self) -> None:
        """Leave the group; idempotent."""
        self._disconnect()
        self._servers.close()

    def _connect(self) -> None:
        if self._connected:
            return
        servers = self._servers
        for client in servers.clients:
            for path in _ONCE:
                with contextlib.suppress(UserError):
                    client.call(path, {})
        self._manifests = servers.on_all(lambda client: ask_weights(client, MANIFEST, servers.timeout_s))
        self._served = merge_manifests(self._manifests, [client.url for client in servers.clients])
        self._connected = True  # before, so that a failure in it lets go of what it made
        self.transport.connect(servers, [len(ranks) for ranks in self._manifests])

    def _disconnect(self) -> None:
        self._known_checksums = {}
        if self._connected:
            self._connected = False
            self.transport.disconnect()

    def _stream(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> tuple[Checksums, str]:
        """Send what is to be sent; returns the checksums of all slices, and the digest of all whole tensors."""
        expected: Checksums = {}
        digest = WeightChecksum()
        missing = dict.fromkeys(self._served)
        self.sent = {"tensors": 0, "bytes": 0}
        sender = BucketSender(self.transport.send, self.transport.allocate, self.bucket_bytes)
        for name, tensor in self._with_tied_head(named_tensors):
            where = f"weight update to version {version}, tensor {name}"
            served = self._served.get(name)
            if served is None:
                raise UserError("no server has it", where=where, expected="the served model's own names")
            if name not in missing:
                raise UserError("sent twice", where=where, expected="each tensor once")
            if tuple(tensor.shape) != served.shape:
                raise UserError(f"shape {tuple(tensor.shape)}", where=where, expected=str(served.shape))
            del missing[name]
            tensor = _cast(tensor, served.dtype)
            whole, slices = hash_slices(name, tensor, served)
            digest.add_checksum(whole)
            expected |= slices
            if self.only_changed and all(
                self._known_checksums.get(each) == checksum for each, checksum in slices.items()
            ):
                continue
            sender.add(name, tensor)
            self.sent["tensors"] += 1
            self.sent["bytes"] += tensor.nbytes
        sender.finish()
        if missing:
            names = ", ".join(list(missing)[:3]) + (", …" if len(missing) > 3 else "")
            raise UserError(
                f"{len(missing)} tensors did not come: {names}",
                where=f"weight update to version {version}",
                expected=f"all {len(self._served)} tensors",
            )
        return expected, digest.hexdigest()

    def _with_tied_head(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """SGLang's Qwen3-MoE keeps a head of its own even where the checkpoint ties it to the embedding."""
        tied = _HEAD in self._served and any(client.shape.tie_word_embeddings for client in self.clients)
        for name, tensor in named_tensors:
            if tied and name == _HEAD:
                continue
            yield name, tensor
            if tied and name == _EMBEDDING:
                yield _HEAD, tensor

    def _check(self, expected: Checksums, version: int) -> None:
        """Compare what every rank of every server holds with what was streamed; see `update` for what is raised."""
        servers = self._servers
        answers = servers.on_all(lambda client: ask_weights(client, CHECKSUM, servers.timeout_s))
        before = ", as they did the time before" if self._differed else ""
        faults: list[ServerFault] = []
        for client, manifest, ranks in zip(servers.clients, self._manifests, answers, strict=True):
            if [held.keys() for held in ranks] != [described.keys() for described in manifest]:
                where = f"server {client.url} /weights_checker"
                raise ServerFault("sums up other tensors than it says it holds", url=client.url, where=where)
            for rank, (held, described) in enumerate(zip(ranks, manifest, strict=True)):
                wrong = [
                    name
                    for name, value in held.items()
                    if value != f"{expected[name, described[name].partition(' ')[2]]:016x}"
                ]
                if wrong:
                    names = ", ".join(wrong[:3]) + (", …" if len(wrong) > 3 else "")
                    fault = ChecksumMismatch(
                        f"{len(wrong)} of {len(held)} tensors differ after the update to version {version}"
                        f"{before}: {names}",
                        url=client.url,
                        where=f"server {client.url}, rank {rank}",
                        expected="the checksum of what the trainer streamed",
                        fix="the server stays paused; update again, or restart it",
                    )
                    faults.append(fault)
        if not faults:
            return
        error, again = as_one_error(faults), not self._differed
        self._differed = True
        if not again:
            raise error
        raise WeightsNeeded(error.what, where=error.where, expected=error.expected, fix=error.fix, faults=faults)


def _cast(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    import torch

    return tensor.detach().to(getattr(torch, dtype))


def hash_slices(name: str, tensor: torch.Tensor, served: ServedTensor) -> tuple[int, Checksums]:
    """Checksum of the whole tensor, and of every slice that a server holds."""
    whole_ranges = tuple((0, size) for size in tensor.shape)
    whole, slices = None, {}
    for ranges in served.slices:
        key = ",".join(f"{start}:{stop}" for start, stop in ranges)
        part = tensor[tuple(slice(start, stop) for start, stop in ranges)]
        slices[name, key] = checksum = tensor_checksum(name, part)
        if ranges == whole_ranges:
            whole = checksum
    return tensor_checksum(name, tensor) if whole is None else whole, slices
