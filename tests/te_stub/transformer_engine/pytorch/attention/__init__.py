"""Stand-in for pytorch/attention."""

from .dot_product_attention import DotProductAttention
