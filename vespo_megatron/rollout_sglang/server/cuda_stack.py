"""What trainer and servers must agree on to exchange weights between GPUs: PyTorch, CUDA and NCCL of both interpreters.

NCCL refuses a communicator of two versions (bootstrap, "Mismatched NCCL version detected"); memory handles of CUDA IPC
are pickled by one PyTorch and read by another.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from vespo_megatron.errors import UserError

_DEADLINE_S = 60.0
_ASK = """
import json, torch
cuda = torch.version.cuda
nccl = ".".join(map(str, torch.cuda.nccl.version())) if cuda and torch.distributed.is_nccl_available() else None
print(json.dumps(dict(torch=torch.__version__, cuda=cuda, nccl=nccl)))
"""


@dataclass(frozen=True)
class CudaStack:
    """Of one interpreter."""

    torch: str
    cuda: str | None
    """None: a build for the CPU."""
    nccl: str | None

    def __str__(self) -> str:
        """For instance 'torch 2.11.0, CUDA 13.0, NCCL 2.28.9'."""
        if self.cuda is None:
            return f"torch {self.torch}, built for the CPU"
        return f"torch {self.torch}, CUDA {self.cuda}, NCCL {self.nccl or 'missing'}"


def stack_of(python: str) -> CudaStack:
    """What an interpreter has. Raises UserError where it cannot be run or has no PyTorch."""
    where = "policy.generation.sglang_cfg.python"
    try:
        done = subprocess.run([python, "-c", _ASK], capture_output=True, text=True, timeout=_DEADLINE_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{python} cannot be asked for its versions ({error})", where=where) from error
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"{python} has no PyTorch that imports: {said[:200]}", where=where)
    return CudaStack(**json.loads(done.stdout.splitlines()[-1]))


def obstacles(trainer: CudaStack, server: CudaStack, transport: str) -> Iterator[str]:
    """Why weights on GPUs cannot go from one to the other by `weight_transport`; nothing where they can."""
    if transport == "disk":
        return
    for whose, stack in (("trainer's", trainer), ("servers'", server)):
        if stack.cuda is None:
            yield f"the {whose} interpreter has {stack}"
            return
    if transport == "distributed":
        if trainer.nccl != server.nccl:
            yield f"NCCL {trainer.nccl} of the trainer and {server.nccl} of the servers make no communicator"
        return
    for what in ("torch", "cuda"):
        ours, theirs = (".".join(asdict(stack)[what].split("+")[0].split(".")[:2]) for stack in (trainer, server))
        if ours != theirs:
            yield f"memory handles of {what} {ours} are not those of {what} {theirs}"


def check_exchange(python: str, own_python: str, transport: str) -> None:
    """Raise `UserError` before anything is started where the two interpreters cannot exchange weights on GPUs."""
    if transport == "disk" or python == own_python:
        return
    trainer, server = stack_of(own_python), stack_of(python)
    if found := "; ".join(obstacles(trainer, server, transport)):
        raise UserError(
            f"is {transport}, and {found}",
            where="policy.generation.sglang_cfg.weight_transport",
            expected=f"the same on both sides: trainer {trainer}; servers {server}",
            fix="install the same PyTorch in both environments, or set weight_transport=disk",
        )
