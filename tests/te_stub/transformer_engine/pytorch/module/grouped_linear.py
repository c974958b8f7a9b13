"""Stand-in for pytorch/module/grouped_linear.py: one weight an expert, one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ..distributed import size_of
from .base import TransformerEngineBaseModule


class GroupedLinear(TransformerEngineBaseModule):
    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: dist.ProcessGroup | None = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable[[torch.Tensor], Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = "cuda",
        ub_name: str | None = None,
    ) -> None:
        super().__init__()
        del sequence_parallel, ub_name
        assert not bias and not return_bias and not fuse_wgrad_accumulation
        self.num_gemms, self.use_bias, self.parallel_mode = num_gemms, bias, parallel_mode
        self.tp_size = tp_size if tp_group is None else size_of(tp_group)
        rows = out_features // self.tp_size if parallel_mode == "column" else out_features
        columns = in_features // self.tp_size if parallel_mode == "row" else in_features
        for index in range(num_gemms):
            self.make_weight(
                f"weight{index}",
                rows,
                columns,
                dim=1 if parallel_mode == "row" else 0,
                dtype=params_dtype,
                device=device,
                init_method=init_method,
                get_rng_state_tracker=get_rng_state_tracker,
                rng_tracker_name=rng_tracker_name,
            )

    def forward(
        self, inp: torch.Tensor, m_splits: Sequence[int], is_first_microbatch: bool | None = None
    ) -> torch.Tensor:
        del is_first_microbatch
        assert isinstance(m_splits, list) and len(m_splits) == self.num_gemms and sum(m_splits) == len(inp)
        parts = inp.split(m_splits)
        return torch.cat(
            [torch.nn.functional.linear(part, getattr(self, f"weight{index}")) for index, part in enumerate(parts)]
        )
