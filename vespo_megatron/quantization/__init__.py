"""Fake quantisation: tensors rounded to a narrower format and handed on in their own dtype; no engine is known here."""

from vespo_megatron.quantization.fake import FORMATS, fake_quantize, fake_quantize_cache, fake_quantize_tokens
from vespo_megatron.quantization.weights import WeightQuantizer

__all__ = ["FORMATS", "WeightQuantizer", "fake_quantize", "fake_quantize_cache", "fake_quantize_tokens"]
