"""Whether everything that `gpu_day.py` runs can be imported here, in which versions, and on which GPU.

python benchmarks/gpu_versions.py
"""

from __future__ import annotations

import importlib
import pkgutil
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PACKAGES = ("torch", "triton", "transformers", "megatron-core", "datasets", "pydantic", "omegaconf", "numpy", "pytest")
NOT_HERE = ("sglang", "vespo_megatron.rollout_sglang.plugin", "vespo_megatron.nemo_entry")
"""What a machine without SGLang or NeMo cannot import."""


def modules() -> list[str]:
    """Every module of the package that needs nothing of SGLang's or NeMo's."""
    import vespo_megatron

    names = [found.name for found in pkgutil.walk_packages(vespo_megatron.__path__, "vespo_megatron.")]
    return [name for name in names if not name.startswith(NOT_HERE) and not name.endswith("__main__")]


def main() -> int:
    """1 where a module cannot be imported."""
    print(f"Python {platform.python_version()}")
    for package in PACKAGES:
        try:
            print(f"{package} {version(package)}")
        except PackageNotFoundError:
            print(f"{package} is not installed")
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        print(f"{torch.cuda.get_device_name()}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
        print(f"CUDA {torch.version.cuda}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
    started, broken = time.perf_counter(), 0
    for name in modules():
        try:
            importlib.import_module(name)
        except Exception as error:
            broken += 1
            print(f"{name}: {type(error).__name__}: {error}")
    print(f"{len(modules())} modules imported in {time.perf_counter() - started:.1f} s, {broken} of them not")
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
