"""Layer specs of the policy: `native`, or Transformer Engine's where it can be used."""

from __future__ import annotations

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from vespo_megatron.errors import UserError
from vespo_megatron.megatron.native.attention import PackedAttention
from vespo_megatron.megatron.native.moe import NativeMoELayer
from vespo_megatron.megatron.native.norm import RMSNorm


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


def native_layer_spec(config: TransformerConfig, *, is_moe: bool) -> ModuleSpec:
    """One decoder layer of plain PyTorch parts."""
    spec = get_gpt_layer_local_spec(
        qk_layernorm=config.qk_layernorm,
        normalization="RMSNorm",
    )
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention = layer.self_attention.submodules
    attention.core_attention = PackedAttention
    if attention.q_layernorm is not IdentityOp:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if is_moe:
        layer.mlp = NativeMoELayer
    return spec


def block_spec(config: TransformerConfig, layer_spec: str, vp_stage: int | None) -> TransformerBlockSubmodules:
    """The layers this pipeline rank and model chunk builds, dense and MoE ones as `config.moe_layer_freq` says."""
    if layer_spec == "te":
        return get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    specs = {is_moe: native_layer_spec(config, is_moe=bool(is_moe)) for is_moe in set(config.moe_layer_freq)}
    return TransformerBlockSubmodules(
        layer_specs=[specs[is_moe] for is_moe in config.moe_layer_freq[first : first + count]], layer_norm=RMSNorm
    )
