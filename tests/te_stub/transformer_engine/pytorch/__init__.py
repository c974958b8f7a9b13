"""Stand-in for transformer_engine/pytorch."""

from . import distributed, ops, optimizers, permutation
from .attention import DotProductAttention
from .module import GroupedLinear, LayerNormLinear, Linear, RMSNorm


class TransformerLayer:
    """Only looked for: a package that has it is whole."""
