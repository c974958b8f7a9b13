"""Which weights are rounded, by Hugging Face name, and to what."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch

from vespo_megatron.errors import UserError
from vespo_megatron.quantization.fake import fake_quantize
from vespo_megatron.recipe.schema import PolicyConfig


class WeightQuantizer:
    """Rounds those tensors whose Hugging Face name `pattern` is found in; vectors pass as they are.

    Args:
        scheme, group_size: see `fake_quantize`.
        pattern: a regular expression, searched for in the name.
        where: the key that `pattern` is of, for the error.
    """

    def __init__(
        self,
        scheme: str,
        pattern: str,
        group_size: int | None = None,
        *,
        where: str = "policy.generation.mismatch.weights_pattern",
    ) -> None:
        self.scheme, self.group_size, self._pattern, self._where = scheme, group_size, re.compile(pattern), where

    @classmethod
    def of(cls, config: PolicyConfig) -> WeightQuantizer | None:
        """Of weights on their way to the engine, as `policy.quantization` or `policy.generation.mismatch` says.

        None where they travel as they are.
        """
        flow, dial = config.quantization, config.generation.mismatch
        if flow.scheme != "none":
            where = "policy.quantization.weights_pattern"
            return cls(flow.scheme, flow.weights_pattern, flow.group_size, where=where)
        if dial.weights != "none":
            return cls(dial.weights, dial.weights_pattern, dial.group_size)
        return None

    def takes(self, name: str, dimensions: int) -> bool:
        """Whether the tensor of that Hugging Face name, with so many dimensions, is rounded."""
        return dimensions >= 2 and self._pattern.search(name) is not None

    def rounded(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The whole tensor of that Hugging Face name: a new one where it is rounded, itself where not."""
        if not self.takes(name, tensor.dim()):
            return tensor
        return fake_quantize(tensor, self.scheme, self.group_size)

    @torch.no_grad()
    def __call__(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same names and shapes, one tensor at a time; what comes in is not changed.

        Raises:
            UserError: the stream is over, and no tensor of it was to be rounded.
        """
        taken = 0
        for name, tensor in named_tensors:
            taken += self.takes(name, tensor.dim())
            yield name, self.rounded(name, tensor)
        if not taken:
            raise UserError(
                f"{self._pattern.pattern!r} is found in no matrix's name",
                where=self._where,
                expected="a regular expression that fits names such as model.layers.0.self_attn.q_proj.weight",
            )
