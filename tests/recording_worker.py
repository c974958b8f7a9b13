"""A trainer process whose calls of the servers' memory and of its own are written down, in the order of all ranks."""

from __future__ import annotations

import fcntl
import functools
import os
import sys
from pathlib import Path

from vespo_megatron.launch import worker
from vespo_megatron.megatron.parked_memory import ParkedMemory
from vespo_megatron.rollout_sglang.client.client import SGLangClient

PATHS = ("/release_memory_occupation", "/resume_memory_occupation", "/begin_weight_update", "/end_weight_update")


def write_down(line: str) -> None:
    with open(os.environ["RECORD"], "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(line + "\n")


def written_down(name: str, function):
    """A call that moves something is written down at its end."""

    @functools.wraps(function)
    def call(memory, *parts):
        before = memory.parked
        function(memory, *parts)
        if moved := before ^ memory.parked:
            write_down(f"rank {os.environ['RANK']} {name} {' '.join(sorted(moved))}")

    return call


def call_server(call, client, path, body=None, **options):
    """A call of one of `PATHS` is written down before it is made, a generation before its first request."""
    if path in PATHS:
        write_down(f"{path[1:].removesuffix('_occupation')} {' '.join((body or {}).get('tags', ()))}".strip())
    return call(client, path, body, **options)


async def generate(original, client, session, requests):
    if not requests[0].request_id.startswith("probe"):
        write_down("generate")
    return await original(client, session, requests)


if __name__ == "__main__":
    ParkedMemory.park = written_down("parks", ParkedMemory.park)
    ParkedMemory.restore = written_down("restores", ParkedMemory.restore)
    SGLangClient.call = functools.partialmethod(functools.partial(call_server, SGLangClient.call))
    SGLangClient.generate = functools.partialmethod(functools.partial(generate, SGLangClient.generate))
    sys.exit(worker.main(Path(sys.argv[1]), sys.argv[2]))
