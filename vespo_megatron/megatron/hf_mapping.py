"""Which Hugging Face tensors each parameter of megatron-core holds, by name."""

from __future__ import annotations

import re

import torch

from vespo_megatron.families.shape import ModelShape
from vespo_megatron.megatron.shard_rules import GateUp, GroupedQKV, Rule, Split, Stacked, Vocabulary

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_STACK = re.compile(r"mlp\.experts\.(linear_fc[12])_weight")
_EXPERT = re.compile(r"mlp\.experts\.(?:local_experts\.(\d+)\.(linear_fc[12])\.weight|(linear_fc[12])\.weight(\d+))")


def rule_for(name: str, shape: ModelShape, *, layer: int | None, first_expert: int, num_local_experts: int) -> Rule:
    """The rule of a megatron-core parameter or saved buffer, local or Transformer Engine names.

    Args:
        name: as `PolicyModel.named_parameters` gives it.
        layer: global layer index (from 0) of a decoder layer's parameter.
        first_expert: global index of this rank's first expert.
        num_local_experts: how many it has.

    Raises:
        KeyError: no rule for this name.
    """
    embedding = "model.embed_tokens.weight"
    if name == "embedding.word_embeddings.weight":
        return Vocabulary((embedding,), vocab_size=shape.vocab_size)
    if name == "output_layer.weight":
        return Vocabulary((embedding if shape.tie_word_embeddings else "lm_head.weight",), vocab_size=shape.vocab_size)
    if name == "decoder.final_layernorm.weight":
        return Rule(("model.norm.weight",))
    match = _LAYER.fullmatch(name)
    if match is None or layer is None:
        raise KeyError(name)
    prefix, inside = f"model.layers.{layer}.", match[2]
    if stack := _STACK.fullmatch(inside):
        numbers = range(first_expert, first_expert + num_local_experts)
        return Stacked.of([_expert(prefix, number, stack[1], shape) for number in numbers])
    if expert := _EXPERT.fullmatch(inside):
        return _expert(prefix, first_expert + int(expert[1] or expert[4] or 0), expert[2] or expert[3], shape)
    return (_attention(prefix, shape) | _mlp(prefix, shape, is_moe=shape.is_moe_layer[layer]))[inside]


def _attention(prefix: str, shape: ModelShape) -> dict[str, Rule]:
    own = prefix + "self_attn."

    def grouped(kind: str) -> Rule:
        names = tuple(f"{own}{projection}_proj.{kind}" for projection in "qkv")
        return GroupedQKV(names, num_groups=shape.num_key_value_heads, head_dim=shape.head_dim)

    def norm(name: str) -> Rule:
        return Split((own + name,), dim=0) if shape.qk_norm == "width" else Rule((own + name,))

    return {
        "input_layernorm.weight": Rule((prefix + "input_layernorm.weight",)),
        "self_attention.linear_qkv.layer_norm_weight": Rule((prefix + "input_layernorm.weight",)),
        "self_attention.linear_qkv.weight": grouped("weight"),
        "self_attention.linear_qkv.bias": grouped("bias"),
        "self_attention.linear_proj.weight": Split((own + "o_proj.weight",)),
        "self_attention.q_layernorm.weight": norm("q_norm.weight"),
        "self_attention.k_layernorm.weight": norm("k_norm.weight"),
    }


def _mlp(prefix: str, shape: ModelShape, *, is_moe: bool) -> dict[str, Rule]:
    after_attention = Rule((prefix + "post_attention_layernorm.weight",))
    rules = {"pre_mlp_layernorm.weight": after_attention, "mlp.linear_fc1.layer_norm_weight": after_attention}
    if not is_moe:
        return rules | _gated("mlp.", prefix + "mlp.")
    rules["mlp.router.weight"] = Rule((prefix + shape.names.router,))
    rules["mlp.router.expert_bias"] = Rule((prefix + shape.names.correction_bias,))
    return rules | _gated("mlp.shared_experts.", prefix + shape.names.shared_experts)


def _gated(own: str, theirs: str) -> dict[str, Rule]:
    """A dense MLP."""
    return {
        own + "linear_fc1.weight": GateUp((theirs + "gate_proj.weight", theirs + "up_proj.weight")),
        own + "linear_fc2.weight": Split((theirs + "down_proj.weight",)),
    }


def _expert(prefix: str, number: int, linear: str, shape: ModelShape) -> Rule:
    names = shape.names
    own = f"{prefix}{names.experts}{number}."
    if linear == "linear_fc1":
        return GateUp((own + names.gate, own + names.up), is_expert=True)
    return Split((own + names.down,), is_expert=True)


def expected_tensors(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Every tensor of a complete HF checkpoint of this model, with its shape, in file order."""
    hidden = shape.hidden_size
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size, hidden)}
    for layer in range(shape.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        tensors[prefix + "input_layernorm.weight"] = (hidden,)
        tensors |= _attention_tensors(prefix + "self_attn.", shape)
        tensors[prefix + "post_attention_layernorm.weight"] = (hidden,)
        if shape.is_moe_layer[layer]:
            tensors |= _moe_tensors(prefix, shape)
        else:
            tensors |= _gated_tensors(prefix + "mlp.", hidden, shape.intermediate_size)
    tensors["model.norm.weight"] = (hidden,)
    if not shape.tie_word_embeddings:
        tensors["lm_head.weight"] = (shape.vocab_size, hidden)
    return tensors


def _attention_tensors(prefix: str, shape: ModelShape) -> dict[str, tuple[int, ...]]:
    hidden, head = shape.hidden_size, shape.head_dim
    heads = {"q": shape.num_attention_heads, "k": shape.num_key_value_heads, "v": shape.num_key_value_heads}
    tensors: dict[str, tuple[int, ...]] = {}
    for projection, count in heads.items():
        tensors[f"{prefix}{projection}_proj.weight"] = (count * head, hidden)
        if shape.qkv_bias:
            tensors[f"{prefix}{projection}_proj.bias"] = (count * head,)
    tensors[prefix + "o_proj.weight"] = (hidden, heads["q"] * head)
    if shape.qk_norm != "none":
        for projection in "qk":
            tensors[f"{prefix}{projection}_norm.weight"] = (
                head * (heads[projection] if shape.qk_norm == "width" else 1),
            )
    return tensors


def _moe_tensors(prefix: str, shape: ModelShape) -> dict[str, tuple[int, ...]]:
    names, hidden, width = shape.names, shape.hidden_size, shape.moe_intermediate_size
    tensors: dict[str, tuple[int, ...]] = {prefix + names.router: (shape.num_experts, hidden)}
    if shape.correction_bias:
        tensors[prefix + names.correction_bias] = (shape.num_experts,)
    for expert in range(shape.num_experts):
        own = f"{prefix}{names.experts}{expert}."
        tensors |= {
            own + names.gate: (width, hidden),
            own + names.up: (width, hidden),
            own + names.down: (hidden, width),
        }
    if shape.shared_intermediate_size:
        tensors |= _gated_tensors(prefix + names.shared_experts, hidden, shape.shared_intermediate_size)
    return tensors


def _gated_tensors(prefix: str, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    return {
        prefix + "gate_proj.weight": (width, hidden),
        prefix + "up_proj.weight": (width, hidden),
        prefix + "down_proj.weight": (hidden, width),
    }


def stored_dtype(name: str, shape: ModelShape, dtype: torch.dtype) -> torch.dtype:
    """What a model of this dtype keeps that Hugging Face tensor in: routers' correction biases stay in float32."""
    return torch.float32 if name.endswith(shape.names.correction_bias) else dtype


def is_further(name: str, shape: ModelShape) -> bool:
    """Whether it is a tensor of the checkpoint's further layers, which this project neither trains nor exports."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return match is not None and 0 <= int(match[1]) - shape.num_hidden_layers < shape.num_further_layers
