"""Weights to the servers: a stream of Hugging Face tensors, in buckets, over a broadcast group; checked, then served.

One update is a session that the servers must close before they serve again:

1. pause: what runs is aborted, what comes waits;
2. `/begin_weight_update`;
3. per bucket `/update_weights_from_distributed` (`load_format: flattened_bucket`) and one uint8 broadcast. The post
   runs in a thread: a server that refuses never joins the broadcast, and the refusal ends the wait at once;
4. `/end_weight_update`;
5. the checksum: what the servers now hold against what was streamed (`server_weights` says how and why);
6. flush the prefix cache, stamp the version, resume.

A failure anywhere leaves the servers paused: a server answers again only with weights that were checked. The next
`update` starts with a new group.

Memory on the trainer is two buckets: one is filled while the other is under way. A tensor larger than a bucket gets
one of its own.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vespo_megatron.errors import UserError
from vespo_megatron.rollout_sglang.checksum import WeightChecksum, tensor_checksum
from vespo_megatron.rollout_sglang.client import SGLangClient

if TYPE_CHECKING:
    import torch

    from vespo_megatron.rollout_sglang.broadcast_group import BroadcastGroup

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class ServedTensor:
    """What all servers together hold of one Hugging Face tensor."""

    dtype: str
    shape: tuple[int, ...]
    slices: frozenset[tuple[tuple[int, int], ...]]


class WeightSync:
    """Rank 0's side of `weight_transport: distributed`, towards every server at once. Not thread-safe.

    Args:
        clients: the servers.
        device: where buckets live and the backend follows: "cpu" is gloo, "cuda" is NCCL.
        bucket_bytes: size of one bucket.
        timeout_s: deadline of each wait: joining, one bucket, the checksum.
    """

    def __init__(
        self, clients: Sequence[SGLangClient], *, device: str, bucket_bytes: int, timeout_s: float = 300.0
    ) -> None:
        self.clients, self.device, self.bucket_bytes = list(clients), device, bucket_bytes
        self.timeout_s = timeout_s
        self.seconds: dict[str, float] = {}
        """Wall-clock of the last update's parts: stream (with gather and hashing), check, total."""
        self._group: BroadcastGroup | None = None
        self._manifests: list[list[dict[str, str]]] = []
        self._served: dict[str, ServedTensor] = {}
        self._pool = _workers(self.clients)

    def update(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int, *, resume: bool = True) -> str:
        """Make the servers hold exactly these tensors under `version`; returns the checksum both sides agree on.

        Raises `UserError` for a tensor that no server has, that is misshapen, sent twice or missing, for a server that
        refuses or does not answer, and for checksums that differ. The servers are left paused then.
        """
        start = time.monotonic()
        try:
            self._everywhere(SGLangClient.pause)
            self._connect()
            self._post_all("/begin_weight_update", {"selector": "target"})
            expected, digest = self._stream(named_tensors, version)
            self._post_all("/end_weight_update", {})
            streamed = time.monotonic()
            self._check(expected, version)
            self._everywhere(SGLangClient.flush_cache)
            self._post_all("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})
            if resume:
                self._everywhere(SGLangClient.resume)
        except BaseException:
            self._disconnect()
            raise
        end = time.monotonic()
        self.seconds = {"stream": streamed - start, "check": end - streamed, "total": end - start}
        return digest

    def set_servers(self, clients: Sequence[SGLangClient]) -> None:
        """From the next update on exactly these are the servers, in a new group: one died, came back or was added.

        Not while an update is under way. Servers that are left out are told to leave the group, if they still answer.
        """
        self._disconnect()
        self.clients = list(clients)
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool = _workers(self.clients)

    def close(self) -> None:
        """Leave the group; idempotent."""
        self._disconnect()
        self._pool.shutdown(wait=False, cancel_futures=True)

    # ---- the group -------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        if self._group is not None:
            return
        from vespo_megatron.rollout_sglang.broadcast_group import BroadcastGroup, local_address_towards

        for client in self.clients:  # a session that an earlier failure left open
            try:
                client.call("/end_weight_update", {})
            except UserError:
                pass
        self._manifests = [self._ask_weights(client, "vespo_manifest") for client in self.clients]
        self._served = merge_manifests(self._manifests, [client.url for client in self.clients])
        name = f"vespo-{uuid.uuid4().hex[:8]}"
        address = local_address_towards(self.clients[0].url)
        backend = "nccl" if self.device == "cuda" else "gloo"
        sizes = [len(ranks) for ranks in self._manifests]
        world_size = 1 + sum(sizes)
        posts: list[Future[Any]] = []

        def invite(port: int) -> None:
            offset = 1
            for client, size in zip(self.clients, sizes, strict=True):
                body = {
                    "master_address": address,
                    "master_port": port,
                    "rank_offset": offset,
                    "world_size": world_size,
                    "group_name": name,
                    "backend": backend,
                }
                posts.append(self._post(client, "/init_weights_update_group", body))
                offset += size

        self._group = BroadcastGroup.join(
            name=name,
            backend=backend,
            master_address=address,
            world_size=world_size,
            timeout_s=self.timeout_s,
            invite=invite,
            failed=lambda: raise_failed(posts),
        )
        self._await(posts)

    def _disconnect(self) -> None:
        group, self._group = self._group, None
        if group is None:
            return
        for client in self.clients:
            try:
                client.call("/destroy_weights_update_group", {"group_name": group.name}, timeout_s=2.0)
            except UserError:
                pass
        group.close()

    # ---- the stream ------------------------------------------------------------------------------------------------

    def _stream(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int
    ) -> tuple[dict[tuple[str, str], int], str]:
        """Send everything; returns the checksums by (name, slice), and the digest of the whole tensors."""
        expected: dict[tuple[str, str], int] = {}
        digest = WeightChecksum()
        missing = dict.fromkeys(self._served)
        sender = _BucketSender(self._send, self.device, self.bucket_bytes)
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
            digest.add_checksum(_hash_slices(name, tensor, served, expected))
            sender.add(name, tensor)
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

    def _send(
        self, names: list[str], dtypes: list[str], shapes: list[list[int]], flat: torch.Tensor
    ) -> Callable[[], None]:
        """Start one bucket on its way; the returned function waits for it. Tests inject corruption here."""
        assert self._group is not None
        body = {
            "names": names,
            "dtypes": dtypes,
            "shapes": shapes,
            "group_name": self._group.name,
            "load_format": "flattened_bucket",
            "selector": "target",
            "flush_cache": False,
        }
        posts = [self._post(client, "/update_weights_from_distributed", body) for client in self.clients]
        work = self._group.broadcast(flat)

        def wait() -> None:
            deadline = time.monotonic() + self.timeout_s
            while not work.is_completed():
                raise_failed(posts)
                if time.monotonic() > deadline:
                    raise UserError(f"a bucket was not taken within {self.timeout_s:g} s", where="weight update")
                time.sleep(0.0002)
            try:
                work.wait()
            except RuntimeError as error:
                raise_failed(posts)
                raise UserError(f"the broadcast failed: {str(error).splitlines()[0]}", where="weight update") from error
            self._await(posts)

        return wait

    # ---- the check -------------------------------------------------------------------------------------------------

    def _check(self, expected: dict[tuple[str, str], int], version: int) -> None:
        futures = [self._pool.submit(self._ask_weights, client, "vespo_checksum") for client in self.clients]
        for client, manifest, future in zip(self.clients, self._manifests, futures, strict=True):
            for rank, (held, described) in enumerate(zip(future.result(self.timeout_s), manifest, strict=True)):
                wrong = [
                    name
                    for name, value in held.items()
                    if int(value, 16) != expected[name, described[name].partition(" ")[2]]
                ]
                if wrong:
                    names = ", ".join(wrong[:3]) + (", …" if len(wrong) > 3 else "")
                    raise UserError(
                        f"{len(wrong)} of {len(held)} tensors differ after the update to version {version}: {names}",
                        where=f"server {client.url}, rank {rank}",
                        expected="the checksum of what the trainer streamed",
                        fix="the server stays paused; update again, or restart it",
                    )

    def _ask_weights(self, client: SGLangClient, action: str) -> list[dict[str, str]]:
        """One dictionary by Hugging Face name per tensor parallel rank of the server."""
        try:
            reply = client.call("/weights_checker", {"action": action, "selector": "target"}, timeout_s=self.timeout_s)
        except UserError as error:
            if "Unsupported" not in error.what:
                raise
            raise UserError(
                "has no vespo_weights plugin, which the checksum of a weight update needs",
                where=f"server {client.url}",
                fix="pip install --no-deps this package into the server's environment and restart it",
            ) from error
        for rank in reply["ranks"]:
            if "error" in rank["checksums"]:
                raise UserError(rank["checksums"]["error"], where=f"server {client.url} /weights_checker")
        return [rank["checksums"] for rank in sorted(reply["ranks"], key=lambda r: r["parallelism_info"][0]["tp_rank"])]

    # ---- HTTP ------------------------------------------------------------------------------------------------------

    def _post(self, client: SGLangClient, path: str, body: dict[str, Any]) -> Future[Any]:
        return self._pool.submit(client.call, path, body, timeout_s=self.timeout_s)

    def _await(self, posts: Sequence[Future[Any]]) -> None:
        for post in posts:
            post.result(self.timeout_s + 10)

    def _post_all(self, path: str, body: dict[str, Any]) -> None:
        self._await([self._post(client, path, body) for client in self.clients])

    def _everywhere(self, method: Callable[[SGLangClient], Any]) -> None:
        self._await([self._pool.submit(method, client) for client in self.clients])


def _workers(clients: Sequence[SGLangClient]) -> ThreadPoolExecutor:
    """Two posts may be under way to each server."""
    return ThreadPoolExecutor(max(4, 2 * len(clients)), thread_name_prefix="weight-sync")


class _BucketSender:
    """Copies tensors into one of two flat buffers and sends each as it fills.

    A tensor that would start at an offset its dtype is not aligned to begins the next bucket (SGLang refuses it).
    """

    def __init__(self, send: Callable[..., Callable[[], None]], device: str, bucket_bytes: int) -> None:
        self._send, self._device, self._capacity = send, device, bucket_bytes
        self._buffers: list[torch.Tensor | None] = [None, None]
        self._current = 0
        self._names: list[str] = []
        self._dtypes: list[str] = []
        self._shapes: list[list[int]] = []
        self._offset = 0
        self._wait: Callable[[], None] | None = None

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if self._names and (self._offset + tensor.nbytes > self._capacity or self._offset % tensor.element_size() != 0):
            self._flush()
        buffer = self._buffer(tensor.nbytes)
        view = buffer[self._offset : self._offset + tensor.nbytes]
        view.view(tensor.dtype).copy_(tensor.detach().reshape(-1))
        self._names.append(name)
        self._dtypes.append(str(tensor.dtype).removeprefix("torch."))
        self._shapes.append(list(tensor.shape))
        self._offset += tensor.nbytes

    def finish(self) -> None:
        """Send what is left and wait for all of it."""
        if self._names:
            self._flush()
        self._wait_for_previous()

    def _buffer(self, nbytes: int) -> torch.Tensor:
        import torch

        buffer = self._buffers[self._current]
        if buffer is None or self._offset + nbytes > buffer.numel():
            assert self._offset == 0
            buffer = torch.empty(max(nbytes, self._capacity), dtype=torch.uint8, device=self._device)
            self._buffers[self._current] = buffer
        return buffer

    def _flush(self) -> None:
        buffer = self._buffers[self._current]
        assert buffer is not None
        self._wait_for_previous()
        self._wait = self._send(self._names, self._dtypes, self._shapes, buffer[: self._offset])
        if buffer.numel() > self._capacity:
            self._buffers[self._current] = None  # the sender's closure keeps an oversized one until it is sent
        self._names, self._dtypes, self._shapes, self._offset = [], [], [], 0
        self._current = 1 - self._current

    def _wait_for_previous(self) -> None:
        wait, self._wait = self._wait, None
        if wait is not None:
            wait()


def merge_manifests(manifests: Sequence[Sequence[dict[str, str]]], urls: Sequence[str]) -> dict[str, ServedTensor]:
    """What the servers hold, by Hugging Face name.

    Raises `UserError` when a server's ranks together do not hold every element of a tensor, or when two servers
    serve different models.
    """
    merged: list[dict[str, ServedTensor]] = []
    for ranks, url in zip(manifests, urls, strict=True):
        parts: dict[str, set[str]] = {}
        for rank in ranks:
            for name, described in rank.items():
                parts.setdefault(name, set()).add(described)
        server: dict[str, ServedTensor] = {}
        for name, described in parts.items():
            dtypes = {text.partition(" ")[0] for text in described}
            slices = frozenset(parse_slice(text) for text in described)
            shape = tuple(
                max(stops) for stops in zip(*([stop for _, stop in ranges] for ranges in slices), strict=True)
            )
            held = sum(_numel(ranges) for ranges in slices)
            if len(dtypes) != 1 or held != _numel([(0, size) for size in shape]):
                raise UserError(
                    f"holds {held} elements of {name} as {sorted(described)}",
                    where=f"server {url}",
                    expected=f"every element of {shape} once, in one dtype",
                )
            server[name] = ServedTensor(dtypes.pop(), shape, slices)
        merged.append(server)
    for server, url in zip(merged[1:], urls[1:], strict=True):
        differing = [name for name in merged[0].keys() | server.keys() if not _same_tensor(merged[0], server, name)]
        if differing:
            raise UserError(
                f"serves another model than {urls[0]}: {len(differing)} tensors differ, for instance {differing[0]}",
                where=f"server {url}",
            )
    result = dict(merged[0])
    for server in merged[1:]:
        for name, tensor in server.items():
            result[name] = ServedTensor(tensor.dtype, tensor.shape, result[name].slices | tensor.slices)
    return result


def _same_tensor(first: dict[str, ServedTensor], second: dict[str, ServedTensor], name: str) -> bool:
    a, b = first.get(name), second.get(name)
    return a is not None and b is not None and (a.dtype, a.shape) == (b.dtype, b.shape)


def parse_slice(described: str) -> tuple[tuple[int, int], ...]:
    """`"float32 0:64,0:32"` -> `((0, 64), (0, 32))`"""
    pairs = described.partition(" ")[2].split(",")
    return tuple((int(start), int(stop)) for start, _, stop in (pair.partition(":") for pair in pairs))


def _numel(ranges: Iterable[tuple[int, int]]) -> int:
    count = 1
    for start, stop in ranges:
        count *= stop - start
    return count


def _cast(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    import torch

    return tensor.detach().to(getattr(torch, dtype))


def _hash_slices(name: str, tensor: torch.Tensor, served: ServedTensor, expected: dict[tuple[str, str], int]) -> int:
    """Fill `expected` for every slice that a server holds; returns the checksum of the whole tensor."""
    whole_ranges = tuple((0, size) for size in tensor.shape)
    whole = None
    for ranges in served.slices:
        key = ",".join(f"{start}:{stop}" for start, stop in ranges)
        part = tensor[tuple(slice(start, stop) for start, stop in ranges)]
        expected[name, key] = checksum = tensor_checksum(name, part)
        if ranges == whole_ranges:
            whole = checksum
    return tensor_checksum(name, tensor) if whole is None else whole


def raise_failed(posts: Sequence[Future[Any]]) -> None:
    """Raise the first failure among posts that are already answered."""
    for post in posts:
        if post.done() and post.exception() is not None:
            raise post.exception()  # type: ignore[misc]
