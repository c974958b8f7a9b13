"""A broadcast group of this process and the servers, apart from the trainer's own `torch.distributed` groups.

The default group and everything registered with it belong to megatron-core. This group has its own TCP store, is
registered nowhere, and works whether or not a default group exists. The servers join through
`/init_weights_update_group`, where SGLang runs `init_custom_process_group` (sglang/srt/utils/common.py); the store's
key prefixes here are those that torch's `_new_process_group_helper` gives that call.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from vespo_megatron.errors import UserError
from vespo_megatron.run.rendezvous import listening_store

Backend = Any
"""torch's ProcessGroupGloo or ProcessGroupNCCL; its stubs know neither their collectives nor gloo's `_Options`."""


class BroadcastGroup:
    """Rank 0 of a group that broadcasts to servers. Create it with `join`, from the thread that will use it."""

    def __init__(self, backend: Backend, store: dist.Store, name: str, world_size: int, timeout_s: float) -> None:
        self._backend: Backend | None = backend
        self._store: dist.Store | None = store  # the servers' ranks meet in it for as long as it is held
        self.name, self.world_size, self.timeout_s = name, world_size, timeout_s
        self._started = False

    @classmethod
    def join(
        cls,
        *,
        name: str,
        backend: str,
        master_address: str,
        world_size: int,
        timeout_s: float,
        invite: Callable[[int], None],
        failed: Callable[[], None],
    ) -> BroadcastGroup:
        """Open a store on a free port of `master_address`, let `invite(port)` tell the servers, and wait for them.

        Args:
            backend: "gloo" or "nccl".
            invite: must return at once (the servers answer only when the group stands).
            failed: called while waiting; raises when a server has refused.

        Raises `UserError` when the group does not stand within `timeout_s`, and whatever `failed` raises.
        """
        store = listening_store(master_address, 0, world_size, timeout_s)
        prefixed = dist.PrefixStore(f"{name}/", dist.PrefixStore(name, store))
        invite(store.port)
        try:
            made = _within(
                timeout_s + 5, lambda: _make_backend(backend, prefixed, world_size, timeout_s, master_address), failed
            )
        except (RuntimeError, TimeoutError) as error:
            raise UserError(
                f"the servers did not join: {error}",
                where=f"weight group {name}",
                fix=f"see the servers' logs; they must be able to connect to {master_address}",
            ) from error
        return cls(made, store, name, world_size, timeout_s)

    def broadcast(self, tensor: torch.Tensor, failed: Callable[[], None]) -> dist.Work:
        """Start sending `tensor` to all; it must not change until the returned work is waited for.

        NCCL makes its communicator in the first call, which returns once every rank is in it.

        Args:
            failed: called while waiting for that; raises when a server has refused.

        Raises `UserError` when the communicator does not stand in time, and whatever `failed` raises.
        """
        assert self._backend is not None, "not after `close`"
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        options.timeout = timedelta(seconds=self.timeout_s)
        backend = self._backend

        def start() -> dist.Work:
            with torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext():  # a thread's own
                return backend.broadcast([tensor], options)

        try:
            work = _within(self.timeout_s, start, failed, at_once=self._started)
        except (RuntimeError, TimeoutError) as error:
            failed()  # it is why, where a server is gone
            raise UserError(
                f"the broadcast could not start: {str(error).splitlines()[0]}",
                where=f"weight group {self.name}",
                fix="see the servers' logs; both sides need the same NCCL and its variables (vespo-megatron preflight)",
            ) from error
        self._started = True
        return work

    def close(self) -> None:
        """Leave; what is under way fails."""
        backend, self._backend = self._backend, None
        if backend is not None:
            for method in ("abort", "shutdown"):
                try:
                    getattr(backend, method)()
                except (AttributeError, RuntimeError):
                    continue
        self._store = None


def _within(seconds: float, make: Callable[[], Any], failed: Callable[[], None], *, at_once: bool = False) -> Any:
    """What `make` returns; it may block for ever, and cannot be interrupted.

    Args:
        failed: called every so often meanwhile; what it raises ends the wait.
        at_once: `make` will not block.

    Raises what `make` raises, and `TimeoutError` at the deadline.
    """
    if at_once:
        return make()
    made: queue.Queue[tuple[Any, Exception | None]] = queue.Queue()

    def run() -> None:
        try:
            made.put((make(), None))
        except Exception as error:
            made.put((None, error))

    threading.Thread(target=run, name="weight group", daemon=True).start()
    deadline = time.monotonic() + seconds
    while True:
        failed()
        try:
            result, error = made.get(timeout=0.02)
        except queue.Empty:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no answer within {seconds:g} s") from None
            continue
        if error is not None:
            raise error
        return result


def local_address_towards(url: str) -> str:
    """The address of this host that a server at `url` can reach it by; loopback stays loopback."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port or 80))
        return probe.getsockname()[0]


def _make_backend(backend: str, store: dist.Store, world_size: int, timeout_s: float, address: str) -> Backend:
    device = next(iter(dist.BackendConfig(dist.Backend(backend)).get_device_backend_map()))
    store = dist.PrefixStore(f"{device}/", store)
    kind: Backend = dist.ProcessGroupGloo if backend == "gloo" else dist.ProcessGroupNCCL
    options = kind._Options() if backend == "gloo" else kind.Options()
    options._timeout = timedelta(seconds=timeout_s)
    if backend == "gloo":
        options._devices = [kind.create_device(hostname=address)]
    result = kind(store, 0, world_size, options)
    result._set_sequence_number_for_group()
    return result
