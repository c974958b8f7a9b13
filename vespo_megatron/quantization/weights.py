"""Which weights of a stream are rounded on their way to the rollout engine, and to what."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch

from vespo_megatron.errors import UserError
from vespo_megatron.quantization.fake import fake_quantize
from vespo_megatron.recipe.schema import MismatchConfig


class WeightQuantizer:
    """Rounds those tensors of a stream whose Hugging Face name `pattern` is found in; vectors pass as they are.

    Args:
        scheme, group_size: see `fake_quantize`.
        pattern: a regular expression, searched for in the name.
    """

    def __init__(self, scheme: str, pattern: str, group_size: int | None = None) -> None:
        self.scheme, self.group_size, self._pattern = scheme, group_size, re.compile(pattern)

    @classmethod
    def of(cls, config: MismatchConfig) -> WeightQuantizer | None:
        """As `policy.generation.mismatch` says; None where weights travel as they are."""
        if config.weights == "none":
            return None
        return cls(config.weights, config.weights_pattern, config.group_size)

    @torch.no_grad()
    def __call__(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same names and shapes, one tensor at a time; what comes in is not changed.

        Raises:
            UserError: the stream is over, and no tensor of it was to be rounded.
        """
        taken = 0
        for name, tensor in named_tensors:
            if tensor.dim() < 2 or not self._pattern.search(name):
                yield name, tensor
                continue
            taken += 1
            yield name, fake_quantize(tensor, self.scheme, self.group_size)
        if not taken:
            raise UserError(
                f"{self._pattern.pattern!r} is found in no matrix's name",
                where="policy.generation.mismatch.weights_pattern",
                expected="a regular expression that fits names such as model.layers.0.self_attn.q_proj.weight",
            )
