"""The Python environment that servers run in: what is found in it, and the variables that a server gets."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vespo_megatron.errors import UserError
from vespo_megatron.families.shape import ModelShape
from vespo_megatron.run.devices import VISIBLE, without_expandable_segments

STUBS = Path(__file__).parents[1] / "plugin" / "stubs"
_PROBE = """
import importlib.metadata as metadata, importlib.util as util, json, sys
found = util.find_spec("sglang")
device, torchvision, gpus = sys.argv[1], util.find_spec("torchvision") is not None, 0
if device != "cpu":
    import torch
    gpus = torch.cuda.device_count()
    device = "cuda" if device == "cuda" or gpus else "cpu"
if torchvision and device == "cpu":
    try:
        import torchvision.transforms
    except Exception:
        torchvision = False
plugins = {point.name for point in metadata.entry_points(group="sglang.srt.platforms")}
print(json.dumps(dict(device=device, torchvision=torchvision, plugin="vespo_cpu" in plugins, num_gpus=gpus,
    folder=list(found.submodule_search_locations)[0] if found else None)))
"""


@dataclass(frozen=True)
class Environment:
    """What was found in the interpreter that will run the server (`probe_environment`)."""

    device: str
    """cuda or cpu"""
    sglang_folder: Path
    has_torchvision: bool
    num_gpus: int = 0
    """That PyTorch offers there."""


def probe_environment(python: str, device: str) -> Environment:
    """Ask the servers' interpreter what it has; raises `UserError` when SGLang (or, on CPU, our plugin) is missing."""
    where = "policy.generation.sglang_cfg.python"
    try:
        answer = subprocess.run([python, "-c", _PROBE, device], capture_output=True, text=True, timeout=60)
    except OSError as error:
        raise UserError(f"{python} cannot be run ({error.strerror})", where=where) from error
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{python} gave no answer within 60 s", where=where) from error
    if answer.returncode != 0:
        raise UserError(f"{python} failed: {answer.stderr.strip()[-500:]}", where=where)
    found = json.loads(answer.stdout.strip().splitlines()[-1])
    if found["folder"] is None:
        raise UserError(
            f"{python} has no sglang",
            where=where,
            fix="install sglang there, or set policy.generation.backend=in_process",
        )
    if not found["plugin"]:
        raise UserError(
            f"{python} has sglang but not vespo_megatron's plugins for it",
            where=where,
            fix=f"{python} -m pip install --no-deps <this repository>",
        )
    return Environment(found["device"], Path(found["folder"]), found["torchvision"], found["num_gpus"])


def build_environment(
    environment: Environment,
    shape: ModelShape,
    *,
    base: dict[str, str],
    threads: dict[str, str],
    tensor_parallel_size: int,
    gpus: Sequence[str] | None = None,
    gives_memory_back: bool = False,
) -> dict[str, str]:
    """Environment variables of the server.

    Args:
        base: the launching process's own.
        threads: `run.host_threads`' variables, for a server that computes on the CPU.
        gpus: the names of its GPUs (`run.devices`); None: all that this process may use.
        gives_memory_back: whether it is to, of GPUs, when it is asked to.

    What belongs to the launching process's own distributed job (`RANK`, `MASTER_PORT`, …) is left out, so that a
    server started from inside one does not believe itself a member.
    """
    foreign = (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "ROLE_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "OMP_NUM_THREADS",
    )
    result = {
        name: value for name, value in base.items() if name not in foreign and not name.startswith("TORCHELASTIC_")
    }
    result["PYTHONUNBUFFERED"] = "1"
    result["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"  # for the margin of the context
    if environment.device != "cpu":
        if gives_memory_back:
            # Without it graphs stay where they are; and SGLang's memory saver refuses expandable segments.
            result["SGLANG_MEMORY_SAVER_CUDA_GRAPH"] = "1"
            result = without_expandable_segments(result)
        return result if gpus is None else result | {VISIBLE: ",".join(gpus)}
    result |= threads
    result |= {
        VISIBLE: "",
        "SGLANG_USE_CPU_ENGINE": "0",
        "SGLANG_PLATFORM": "vespo_cpu",
        "SGLANG_DISABLED_MODEL_ARCHS": ",".join(unused_model_files(environment.sglang_folder, shape.architecture)),
        "GLOO_SOCKET_IFNAME": base.get("GLOO_SOCKET_IFNAME", "lo"),
    }
    if tensor_parallel_size > 1:
        cores, share = sorted(os.sched_getaffinity(0)), int(threads["OMP_NUM_THREADS"])
        groups = [cores[rank * share % len(cores) :][:share] for rank in range(tensor_parallel_size)]
        result["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, group)) for group in groups)
    if not environment.has_torchvision:
        result["PYTHONPATH"] = os.pathsep.join(filter(None, [str(STUBS), base.get("PYTHONPATH", "")]))
    return result


def unused_model_files(sglang_folder: Path, architecture: str) -> list[str]:
    """Stems of SGLang's model files that do not define `architecture`: importing all of them costs ~45 s of start.

    Files that the needed one imports are still imported: this only keeps SGLang's registry from doing so. An empty
    list when no file defines it, so that SGLang says itself what it supports.
    """
    files = sorted((sglang_folder / "srt" / "models").glob("*.py"))
    needed = {file for file in files if f"class {architecture}(" in file.read_text(errors="replace")}
    return [file.stem for file in files if file not in needed and file.stem != "__init__"] if needed else []
