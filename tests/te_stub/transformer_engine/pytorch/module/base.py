"""Stand-in for pytorch/module/base.py: parameters that are made, initialised and marked, and the empty extra state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def get_workspace() -> torch.Tensor:
    """Of cuBLAS; gone from 2.10 on, where megatron-core's import of it fails and its routers multiply by torch.mm."""
    return torch.empty(0)


def get_dummy_wgrad(*_args: object, **_kwargs: object):
    raise AssertionError("only fused gradient accumulation asks for it")


class TransformerEngineBaseModule(torch.nn.Module):
    """What the linear modules share."""

    def __init__(self) -> None:
        super().__init__()
        self.fp8 = self.fp8_calibration = self.fp8_initialized = False
        self.fp8_meta = {"fp8_checkpoint": False, "recipe": None}

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        del num_gemms

    def get_extra_state(self) -> torch.Tensor:
        """Without FP8 an empty tensor (base.py:877)."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        assert state is None or state.numel() == 0

    def make_weight(
        self,
        name: str,
        rows: int,
        columns: int,
        *,
        dim: int,
        dtype: torch.dtype,
        device: Any,
        init_method: Callable[[torch.Tensor], Any],
        get_rng_state_tracker: Callable[[], Any] | None,
        rng_tracker_name: str | None,
    ) -> None:
        weight = torch.nn.Parameter(torch.empty(rows, columns, dtype=dtype, device=device))
        weight.tensor_model_parallel, weight.partition_dim, weight.partition_stride = True, dim, 1
        self.register_parameter(name, weight)
        with torch.no_grad():
            if get_rng_state_tracker is None:
                init_method(weight)
            else:
                with get_rng_state_tracker().fork(*([rng_tracker_name] if rng_tracker_name else [])):
                    init_method(weight)
