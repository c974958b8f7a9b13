"""Stand-in for pytorch/module/linear.py and layernorm_linear.py: sharded linear layers and their collectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ..distributed import copy_in, gather_tokens, scatter_sum, size_of, sum_out
from .base import TransformerEngineBaseModule
from .rmsnorm import rms_norm


class Linear(TransformerEngineBaseModule):
    def __init__(
        self,
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
    ) -> None:
        super().__init__()
        assert not bias and not return_bias and not fuse_wgrad_accumulation
        assert parallel_mode in ("row", "column", None)
        self.tp_group, self.tp_size = tp_group, tp_size if tp_group is None else size_of(tp_group)
        self.in_features = in_features // self.tp_size if parallel_mode == "row" else in_features
        self.out_features = out_features // self.tp_size if parallel_mode == "column" else out_features
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        self.parallel_mode, self.use_bias = parallel_mode, bias
        self.make_weight(
            "weight",
            self.out_features,
            self.in_features,
            dim=1 if parallel_mode == "row" else 0,
            dtype=params_dtype,
            device=device,
            init_method=init_method,
            get_rng_state_tracker=get_rng_state_tracker,
            rng_tracker_name=rng_tracker_name,
        )

    def forward(self, inp: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        del is_first_microbatch  # only FP8 weights are kept from one to the next
        collective = self.parallel_mode is not None and self.tp_size > 1
        if collective and self.parallel_mode == "column":
            inp = (gather_tokens if self.sequence_parallel else copy_in)(inp, self.tp_group)
        output = torch.nn.functional.linear(inp, self.weight)
        if collective and self.parallel_mode == "row":
            output = (scatter_sum if self.sequence_parallel else sum_out)(output, self.tp_group)
        return output


class LayerNormLinear(Linear):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        *,
        normalization: str = "LayerNorm",
        return_layernorm_output: bool = False,
        zero_centered_gamma: bool = False,
        **settings: Any,
    ) -> None:
        assert normalization == "RMSNorm" and not return_layernorm_output and not zero_centered_gamma
        super().__init__(in_features, out_features, **settings)
        self.eps, self.normalization = eps, normalization
        weight = torch.ones(in_features, dtype=settings["params_dtype"], device=settings["device"])
        self.layer_norm_weight = torch.nn.Parameter(weight)
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel
        self.layer_norm_bias = None

    def forward(self, inp: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        return super().forward(rms_norm(inp, self.layer_norm_weight, self.eps), is_first_microbatch)
