"""Layer specs of the policy: `native`, or Transformer Engine's where it can be used."""

from __future__ import annotations

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.fused_a2a import HAVE_DEEP_EP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from vespo_megatron.errors import UserError
from vespo_megatron.families.shape import ModelShape
from vespo_megatron.megatron.native.attention import PackedAttention
from vespo_megatron.megatron.native.moe import NativeMoELayer
from vespo_megatron.megatron.native.norm import RMSNorm, norm_over_the_width
from vespo_megatron.recipe.rules import NEED_TRANSFORMER_ENGINE
from vespo_megatron.recipe.schema import MegatronConfig


def have_transformer_engine() -> bool:
    """Whether Transformer Engine can really be used: the bare package imports with a RuntimeError."""
    try:
        from transformer_engine.pytorch import TransformerLayer  # noqa: F401
    except Exception:
        return False
    return True


def choose_layer_spec(wanted: str, device_type: str) -> str:
    """'te' or 'native' for a recipe's `layer_spec`. Raises `UserError` for 'te' where it cannot run."""
    if wanted not in ("auto", "te", "native"):
        raise UserError(f"is {wanted!r}", where="policy.megatron_cfg.layer_spec", expected="auto, te or native")
    usable = device_type == "cuda" and have_transformer_engine()
    if wanted == "te" and not usable:
        raise UserError(
            "asks for Transformer Engine, which cannot be used here",
            where="policy.megatron_cfg.layer_spec",
            expected="a CUDA device and transformer-engine[pytorch,core_cu12] (the bare package is not enough)",
            fix="install it, or set layer_spec to native",
        )
    return "te" if usable and wanted != "native" else "native"


def layers_of(megatron: MegatronConfig, device_type: str, dtype: torch.dtype) -> str:
    """'te' or 'native' for a recipe. Raises `UserError` where its keys need what is not there.

    Transformer Engine attends to packed sequences in 16 bits alone: its kernels refuse float32, and its unfused
    attention packed sequences (dot_product_attention/utils.py:428, 659 of 2.9) or context parallelism (756 of 2.11).
    """
    layers = choose_layer_spec(megatron.layer_spec, device_type)
    if layers == "te" and dtype not in (torch.bfloat16, torch.float16):
        if megatron.layer_spec == "te":
            raise UserError(
                f"is te with {dtype}",
                where="policy.megatron_cfg.layer_spec",
                expected="policy.precision=bfloat16 or float16: its attention runs in 16 bits",
                fix="set precision to bfloat16, or layer_spec to native",
            )
        layers = "native"
    for name in NEED_TRANSFORMER_ENGINE if layers == "native" else ():
        if getattr(megatron, name):
            raise UserError(
                f"is true, but layer_spec {megatron.layer_spec} is native here",
                where=f"policy.megatron_cfg.{name}",
                expected="Transformer Engine's layers: a CUDA device, 16 bits, transformer-engine[pytorch,core_cu12]",
                fix="set it to false",
            )
    if megatron.moe_token_dispatcher_type == "flex" and not HAVE_DEEP_EP:
        raise UserError(
            "is flex, but DeepEP is not there",
            where="policy.megatron_cfg.moe_token_dispatcher_type",
            expected="the package deep_ep, which NVIDIA's containers have",
            fix="install it, or set it to alltoall",
        )
    return layers


def native_layer_spec(config: TransformerConfig, shape: ModelShape, *, is_moe: bool) -> ModuleSpec:
    """One decoder layer of plain PyTorch parts."""
    spec = get_gpt_layer_local_spec(
        qk_layernorm=config.qk_layernorm,
        normalization="RMSNorm",
    )
    layer = spec.submodules
    if is_moe:
        # One set of names in checkpoints for both kinds of layers: Transformer Engine's spec fuses this norm into
        # `mlp.linear_fc1` in dense layers alone.
        del layer.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention = layer.self_attention.submodules
    attention.core_attention = PackedAttention
    if shape.qk_norm == "head":
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    elif shape.qk_norm == "width":
        norm_over_the_width(attention)
    if is_moe:
        layer.mlp = NativeMoELayer
    return spec


def block_spec(
    config: TransformerConfig, shape: ModelShape, layer_spec: str, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """The layers this pipeline rank and model chunk builds, dense and MoE ones as the shape says."""
    if layer_spec == "te":
        from vespo_megatron.megatron.te.spec import te_block_spec  # megatron-core's wrappers are mocks without it

        return te_block_spec(config, shape, vp_stage)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    here = shape.is_moe_layer[first : first + count]
    specs = {is_moe: native_layer_spec(config, shape, is_moe=is_moe) for is_moe in set(here)}
    return TransformerBlockSubmodules(layer_specs=[specs[is_moe] for is_moe in here], layer_norm=RMSNorm)
