"""GPUs and their links, disk, shared memory, limits."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from vespo_megatron.doctor.findings import FAIL, OK, WARN, Finding
from vespo_megatron.errors import UserError
from vespo_megatron.outputs import check_folder

_GIB = 2**30


def gpus() -> Iterator[Finding]:
    """Each GPU, CUDA and NCCL as PyTorch sees them, and whether the GPUs reach each other's memory."""
    import torch

    if torch.version.cuda is None:
        yield Finding("CUDA", WARN, f"torch {torch.__version__} is a CPU build: training runs on gloo", _GPU_FIX)
        return
    if not torch.cuda.is_available():
        yield Finding("CUDA", WARN, f"torch has CUDA {torch.version.cuda} but finds no GPU", "check nvidia-smi")
        return
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    yield Finding("CUDA", OK, f"{torch.version.cuda}, NCCL {nccl}")
    count = torch.cuda.device_count()
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        busy = free < 0.9 * total
        detail = f"{properties.name}, {total / _GIB:.0f} GiB, {free / _GIB:.0f} free"
        fix = "another process holds its memory: see nvidia-smi" if busy else ""
        yield Finding(f"GPU {index}", WARN if busy else OK, detail, fix)
    apart = [(a, b) for a in range(count) for b in range(a) if not torch.cuda.can_device_access_peer(a, b)]
    if count > 1:
        detail = f"{len(apart)} of {count * (count - 1) // 2} pairs cannot" if apart else "all pairs do"
        yield Finding("GPUs reach each other's memory", WARN if apart else OK, detail, _P2P_FIX if apart else "")


_GPU_FIX = "for GPUs install a CUDA build of torch"
_P2P_FIX = "expert and tensor parallelism will go through host memory: see nvidia-smi topo -m"


def memory() -> Iterator[Finding]:
    """Host memory, cores, shared memory and open files."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB
    yield Finding("host", OK, f"{len(os.sched_getaffinity(0))} cores, {total:.0f} GiB")
    shared = shutil.disk_usage("/dev/shm") if Path("/dev/shm").is_dir() else None
    if shared is None:
        yield Finding("shared memory", FAIL, "there is no /dev/shm", "mount one (docker run --shm-size=16g)")
    else:
        small = shared.free < 2 * _GIB
        detail = f"{shared.free / _GIB:.1f} GiB free in /dev/shm"
        yield Finding("shared memory", WARN if small else OK, detail, "docker run --shm-size=16g" if small else "")
    files, ceiling = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = files < 4096
    fix = f"ulimit -n {min(65536, ceiling)}" if few else ""
    yield Finding("open files", WARN if few else OK, f"{files} at most", fix)


def disk(folder: str) -> Iterator[Finding]:
    """Whether the run directory can be written and its file system has room."""
    path = Path(folder).resolve()
    try:
        check_folder(path, "run directory")
    except UserError as error:
        yield Finding("run directory", FAIL, error.what, "set exp_manager.exp_dir to a folder that can be written")
        return
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free / _GIB
    low = free < 20
    fix = "a checkpoint of Qwen3-30B-A3B with optimizer is about 430 GB" if low else ""
    yield Finding("run directory", WARN if low else OK, f"{free:.0f} GiB free at {path}", fix)
