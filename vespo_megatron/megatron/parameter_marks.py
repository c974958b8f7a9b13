"""Type of the attributes that megatron-core sets on parameters and reads from them."""

from __future__ import annotations

from typing import Protocol, cast

import torch


class ParameterMarks(Protocol):
    """What a parameter may carry besides its values."""

    main_grad: torch.Tensor
    """Where its gradient is added up; DDP makes it."""
    grad_added_to_main_grad: bool
    """The backward has added the gradient to `main_grad` itself (layers.py:610)."""
    allreduce: bool
    """False: the gradient is summed over expert data parallel ranks, not over data parallel ones."""
    sequence_parallel: bool
    """The gradient is summed over tensor parallel ranks, each of which sees another shard of the sequence."""


def marks(parameter: torch.Tensor) -> ParameterMarks:
    """The parameter itself, as something that carries marks: PyTorch's types know no attributes set from outside."""
    return cast(ParameterMarks, parameter)
