"""SGLang's CPU platform, as a plugin: what lets its real server run where there is no accelerator at all.

SGLang 0.5.23 finds this through the entry-point group `sglang.srt.platforms` (`vespo_cpu`), calls `activate()` in
each of its processes, and uses the class it names when that is not None. SGLang's own CPU engine
(`SGLANG_USE_CPU_ENGINE=1`) needs `sgl_kernel` built for AMX; this one runs SGLang's plain PyTorch paths. Only
SGLang's processes import this module: the trainer never does.
"""

from __future__ import annotations

import os
from typing import Any

import torch

_PLATFORM = "vespo_megatron.rollout_sglang.plugin.cpu_platform:VespoCpuPlatform"


def activate() -> str | None:
    """The platform's qualified name, or None wherever an accelerator (or SGLang's own CPU engine) should serve."""
    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return None
    if torch.cuda.is_available() or torch.xpu.is_available():
        return None
    for name in ("npu", "musa"):
        module = getattr(torch, name, None)
        if module is not None and module.is_available():
            return None
    return _PLATFORM


def _allocate(shape: tuple[int, ...], *, dtype: torch.dtype, device: str, **_ignored: Any) -> torch.Tensor:
    """A plain tensor where SGLang would register host memory with CUDA (`mem_cache/pool_host/common.py`)."""
    return torch.empty(shape, dtype=dtype, device=device)


def _leave_sizes_alone() -> None:
    """No padding of experts to multiples of 32 per rank, which only SGLang's AMX kernels need.

    `ModelRunner` pads on every CPU (`adjust_config_with_unaligned_cpu_tp`), but 0.5.23 fills the padding with zeros
    only on its own CPU platform: here it would be uninitialised memory inside the model.
    """
    from sglang.srt.model_executor import model_runner

    model_runner.adjust_config_with_unaligned_cpu_tp = lambda model_config, load_config, tp_size: model_config


def _platform_class() -> type:
    from sglang.srt.platforms.cpu import CpuDeviceMixin
    from sglang.srt.platforms.device_mixin import PlatformEnum
    from sglang.srt.platforms.interface import SRTPlatform

    class VespoCpuPlatform(CpuDeviceMixin, SRTPlatform):
        """A CPU without kernels of its own: `OOT` keeps SGLang off the branches that need `sgl_kernel`."""

        _enum = PlatformEnum.OOT

        def get_default_attention_backend(self) -> str:
            return "torch_native"

        def get_dispatch_key_name(self) -> str:
            return "native"

        def is_pin_memory_available(self, device: Any = None) -> bool:  # noqa: ARG002  (SGLang's signature)
            return False

        def init_backend(self) -> None:
            # Returning routed experts keeps them in a host cache, allocated by this table.
            from sglang.srt.mem_cache.pool_host.common import ALLOC_MEMORY_FUNCS

            ALLOC_MEMORY_FUNCS["cpu"] = _allocate
            _leave_sizes_alone()

    return VespoCpuPlatform


def __getattr__(name: str) -> Any:
    """`VespoCpuPlatform` is made when SGLang asks for it, since `activate` must not need SGLang's classes."""
    if name == "VespoCpuPlatform":
        globals()[name] = _platform_class()
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
