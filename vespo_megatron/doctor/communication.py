"""Do processes find each other: names, ports, a sum over two of them by gloo and by NCCL."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vespo_megatron.doctor.findings import FAIL, OK, WARN, Finding

_DEADLINE = 120.0
_SUM = """
import sys
from datetime import timedelta
import torch
import torch.distributed as dist
backend, store, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
device = torch.device(f"cuda:{rank}" if backend == "nccl" else "cpu")
if backend == "nccl":
    torch.cuda.set_device(device)
dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
value = torch.full((1 << 20,), float(rank + 1), device=device)
dist.all_reduce(value)
assert bool((value == 3).all()), "a sum over two ranks is wrong"
dist.destroy_process_group()
"""


def names_and_ports() -> Iterator[Finding]:
    """gloo looks the machine's own name up; servers listen on the loopback address."""
    name = socket.gethostname()
    try:
        socket.gethostbyname(name)
        yield Finding("this machine's name", OK, "has an address")
    except OSError:
        yield Finding(
            "this machine's name", WARN, "has no address, which gloo asks for", "export GLOO_SOCKET_IFNAME=lo"
        )
    with socket.socket() as listener:
        try:
            listener.bind(("127.0.0.1", 0))
            yield Finding("loopback ports", OK, "can be listened on")
        except OSError as error:
            yield Finding("loopback ports", FAIL, f"cannot be listened on ({error})", "check the sandbox or container")


def gloo() -> Iterator[Finding]:
    """A sum over two processes on the CPU."""
    yield _sum("gloo")


def nccl() -> Iterator[Finding]:
    """A sum over two processes on two GPUs, where there are two."""
    import torch

    if torch.cuda.device_count() >= 2:
        yield _sum("nccl")


def _sum(backend: str) -> Finding:
    import os

    name = f"{backend} sum over 2 ranks"
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        environment = os.environ.copy()
        if backend == "gloo":
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", _SUM, backend, store, str(rank)],
                env=environment,
                text=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            for rank in range(2)
        ]
        try:
            said = [rank.communicate(timeout=_DEADLINE)[1] for rank in ranks]
        except subprocess.TimeoutExpired:
            return Finding(name, FAIL, f"no end in {_DEADLINE:.0f} s", "a firewall or a wrong network interface")
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait(10)
    if any(rank.returncode for rank in ranks):
        lines = [text.strip().splitlines()[-1] for text in said if text.strip()]
        return Finding(name, FAIL, (lines or ["failed without a word"])[0][:200], "the message names the cause")
    return Finding(name, OK, "is right")


CHECKS = [names_and_ports, gloo, nccl]
