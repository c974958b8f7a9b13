"""Stand-in for pytorch/module."""

from .grouped_linear import GroupedLinear
from .linear import LayerNormLinear, Linear
from .rmsnorm import RMSNorm
