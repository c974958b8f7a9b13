"""A pool of processes that stay up across tests, each run of which is one torch.distributed world.

Importing megatron-core takes seconds, a layout's test a fraction of one: start the processes once and lay out the
parallel state anew for each task.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any


class WorkerPool:
    """`run(function, world_size, **kwargs)` calls `function(**kwargs)` on every rank and returns their answers."""

    def __init__(self, *, deadline: float = 120.0) -> None:
        self.deadline = deadline
        self._workers: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []
        self._folder = tempfile.mkdtemp(prefix="worker-pool-")

    def run(self, function: Callable[..., Any], world_size: int, **kwargs: Any) -> list[Any]:
        """Raises `RuntimeError` with the first failed rank's traceback; a silent rank counts after the deadline."""
        self._grow(world_size)
        store = os.path.join(self._folder, uuid.uuid4().hex)
        connections = [connection for _, connection in self._workers[:world_size]]
        for rank, connection in enumerate(connections):
            connection.send((function, kwargs, rank, world_size, f"file://{store}"))
        answers: dict[int, Any] = {}
        until = time.monotonic() + self.deadline
        while len(answers) < world_size:
            silent = [connection for rank, connection in enumerate(connections) if rank not in answers]
            ready = wait(silent, timeout=max(0.0, until - time.monotonic()))
            if not ready:
                ranks = [rank for rank in range(world_size) if rank not in answers]
                self.close()
                raise RuntimeError(f"ranks {ranks} did not answer within {self.deadline:.0f} s")
            for connection in ready:
                rank = connections.index(connection)
                try:
                    ok, answer = connection.recv()
                except EOFError:
                    ok, answer = False, "the process died"
                if not ok:
                    self.close()
                    raise RuntimeError(f"rank {rank} failed:\n{answer}")
                answers[rank] = answer
        return [answers[rank] for rank in range(world_size)]

    def _grow(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        while len(self._workers) < size:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def close(self) -> None:
        """End every worker: idle ones leave by themselves, and take with them what they started."""
        for _, connection in self._workers:
            connection.close()
        deadline = time.monotonic() + 10
        for process, _ in self._workers:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
        self._workers.clear()


def _forget_models() -> None:
    """Free the task's models and process groups; each gloo group polls with two threads for as long as it lives.

    megatron-core's DDP and the gradient accumulators it hooks (distributed_data_parallel.py:345) keep each other
    alive through C++, where the garbage collector cannot look.
    """
    from megatron.core.distributed import DistributedDataParallel

    from vespo_megatron.megatron import parallel

    for candidate in gc.get_objects():
        if isinstance(candidate, DistributedDataParallel):
            vars(candidate).clear()  # an empty shell stays behind
    parallel.finalize()


def _serve(connection: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            function, kwargs, rank, world_size, store = connection.recv()
        except EOFError:
            return
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
        try:
            answer = (True, function(store=store, **kwargs))
        except BaseException:
            answer = (False, traceback.format_exc())
        finally:
            _forget_models()
        connection.send(answer)
