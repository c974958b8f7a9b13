"""Mapping between megatron-core's parameters and Hugging Face's tensors of a Qwen3-MoE. Pure: shapes and slices only.

A megatron-core parameter is one *shard* of one or several HF tensors joined together. A `Rule` knows both ways:
`shard(hf_tensors, index, count)` and `merge(shards)`. Facts (PITFALLS.md): `linear_qkv` is grouped, for each
key-value group its query heads, then its key, then its value; `linear_fc1` is gate above up, inside each shard.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vespo_megatron.recipe.model_shape import ModelShape


@dataclass(frozen=True)
class Rule:
    """One parameter, replicated over tensor parallel ranks. `names` are the HF tensors it holds."""

    names: tuple[str, ...]
    is_expert: bool = False
    """Sharded over expert tensor parallel ranks instead of tensor parallel ones."""
    is_sharded = False

    def shard(self, tensors: Sequence[torch.Tensor], index: int, count: int) -> torch.Tensor:
        """HF tensors → shard `index` of `count`."""
        del index, count  # every rank holds all of it
        return tensors[0]

    def merge(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """All shards in order → HF tensors, in the order of `names`."""
        return [shards[0]]


@dataclass(frozen=True)
class Split(Rule):
    """Cut along `dim`: 1 for row-parallel weights (`o_proj`, `down_proj`)."""

    dim: int = 1
    is_sharded = True

    def shard(self, tensors: Sequence[torch.Tensor], index: int, count: int) -> torch.Tensor:
        """See `Rule`."""
        return tensors[0].chunk(count, dim=self.dim)[index]

    def merge(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `Rule`."""
        return [torch.cat(list(shards), dim=self.dim)]


@dataclass(frozen=True)
class Vocabulary(Rule):
    """Rows cut after padding the vocabulary with zeros to a multiple of the shard count."""

    vocab_size: int = 0
    is_sharded = True

    def shard(self, tensors: Sequence[torch.Tensor], index: int, count: int) -> torch.Tensor:
        """See `Rule`."""
        rows = -(-self.vocab_size // count)
        shard = tensors[0][index * rows : (index + 1) * rows]
        padding = shard.new_zeros(rows - shard.shape[0], shard.shape[1])
        return torch.cat([shard, padding]) if len(padding) else shard

    def merge(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `Rule`."""
        return [torch.cat(list(shards))[: self.vocab_size]]


@dataclass(frozen=True)
class GateUp(Rule):
    """`linear_fc1`: gate above up, each cut along its rows."""

    is_sharded = True

    def shard(self, tensors: Sequence[torch.Tensor], index: int, count: int) -> torch.Tensor:
        """See `Rule`."""
        return torch.cat([tensor.chunk(count)[index] for tensor in tensors])

    def merge(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `Rule`."""
        halves = [shard.chunk(2) for shard in shards]
        return [torch.cat([half[part] for half in halves]) for part in (0, 1)]


@dataclass(frozen=True)
class GroupedQKV(Rule):
    """`linear_qkv`: groups of (query heads, key, value), cut by groups."""

    num_groups: int = 0
    head_dim: int = 0
    is_sharded = True

    def shard(self, tensors: Sequence[torch.Tensor], index: int, count: int) -> torch.Tensor:
        """See `Rule`."""
        grouped = [tensor.unflatten(0, (self.num_groups, -1)) for tensor in tensors]
        return torch.cat(grouped, dim=1).chunk(count)[index].flatten(0, 1)

    def merge(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `Rule`."""
        grouped = torch.cat(list(shards)).unflatten(0, (self.num_groups, -1))
        query_rows = grouped.shape[1] - 2 * self.head_dim
        parts = grouped.split([query_rows, self.head_dim, self.head_dim], dim=1)
        return [part.flatten(0, 1) for part in parts]


@dataclass(frozen=True)
class Stacked(Rule):
    """Experts one above the other along a new first dimension, each by its own rule of `parts`."""

    parts: tuple[Rule, ...] = ()
    is_sharded = True

    @staticmethod
    def of(parts: Sequence[Rule]) -> Stacked:
        """The rule of a stack of these."""
        names = tuple(name for part in parts for name in part.names)
        return Stacked(names, is_expert=True, parts=tuple(parts))

    def shard(self, tensors: Sequence[torch.Tensor], index: int, count: int) -> torch.Tensor:
        """See `Rule`."""
        width = len(self.parts[0].names)
        return torch.stack(
            [
                part.shard(tensors[number * width : (number + 1) * width], index, count)
                for number, part in enumerate(self.parts)
            ]
        )

    def merge(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `Rule`."""
        return [
            tensor
            for number, part in enumerate(self.parts)
            for tensor in part.merge([shard[number] for shard in shards])
        ]


_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_STACK = re.compile(r"mlp\.experts\.(linear_fc[12])_weight")
_EXPERT = re.compile(r"mlp\.experts\.(?:local_experts\.(\d+)\.(linear_fc[12])\.weight|(linear_fc[12])\.weight(\d+))")


def rule_for(name: str, shape: ModelShape, *, layer: int | None, first_expert: int, num_local_experts: int) -> Rule:
    """The rule of a megatron-core parameter, local or Transformer Engine names.

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
        return Stacked.of([_expert(f"{prefix}mlp.experts.{number}.", stack[1]) for number in numbers])
    if expert := _EXPERT.fullmatch(inside):
        number = first_expert + int(expert[1] or expert[4] or 0)
        return _expert(f"{prefix}mlp.experts.{number}.", expert[2] or expert[3])
    is_moe = shape.is_moe_layer[layer]
    attention = prefix + "self_attn."
    rules = {
        "input_layernorm.weight": Rule((prefix + "input_layernorm.weight",)),
        "self_attention.linear_qkv.layer_norm_weight": Rule((prefix + "input_layernorm.weight",)),
        "self_attention.linear_qkv.weight": GroupedQKV(
            (attention + "q_proj.weight", attention + "k_proj.weight", attention + "v_proj.weight"),
            num_groups=shape.num_key_value_heads,
            head_dim=shape.head_dim,
        ),
        "self_attention.linear_proj.weight": Split((attention + "o_proj.weight",)),
        "self_attention.q_layernorm.weight": Rule((attention + "q_norm.weight",)),
        "self_attention.k_layernorm.weight": Rule((attention + "k_norm.weight",)),
        "pre_mlp_layernorm.weight": Rule((prefix + "post_attention_layernorm.weight",)),
        "mlp.linear_fc1.layer_norm_weight": Rule((prefix + "post_attention_layernorm.weight",)),
    }
    if is_moe:
        rules["mlp.router.weight"] = Rule((prefix + "mlp.gate.weight",))
    else:
        rules["mlp.linear_fc1.weight"] = GateUp((prefix + "mlp.gate_proj.weight", prefix + "mlp.up_proj.weight"))
        rules["mlp.linear_fc2.weight"] = Split((prefix + "mlp.down_proj.weight",))
    return rules[inside]


def _expert(prefix: str, linear: str) -> Rule:
    if linear == "linear_fc1":
        return GateUp((prefix + "gate_proj.weight", prefix + "up_proj.weight"), is_expert=True)
    return Split((prefix + "down_proj.weight",), is_expert=True)


def expected_tensors(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Every tensor of a complete HF checkpoint of this model, with its shape, in file order."""
    hidden, head = shape.hidden_size, shape.head_dim
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size, hidden)}
    for layer in range(shape.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        tensors[prefix + "input_layernorm.weight"] = (hidden,)
        for projection, heads in (
            ("q", shape.num_attention_heads),
            ("k", shape.num_key_value_heads),
            ("v", shape.num_key_value_heads),
        ):
            tensors[f"{prefix}self_attn.{projection}_proj.weight"] = (heads * head, hidden)
        tensors[prefix + "self_attn.o_proj.weight"] = (hidden, shape.num_attention_heads * head)
        tensors[prefix + "self_attn.q_norm.weight"] = tensors[prefix + "self_attn.k_norm.weight"] = (head,)
        tensors[prefix + "post_attention_layernorm.weight"] = (hidden,)
        if shape.is_moe_layer[layer]:
            tensors[prefix + "mlp.gate.weight"] = (shape.num_experts, hidden)
            for expert in range(shape.num_experts):
                tensors |= _mlp(f"{prefix}mlp.experts.{expert}.", hidden, shape.moe_intermediate_size)
        else:
            tensors |= _mlp(prefix + "mlp.", hidden, shape.intermediate_size)
    tensors["model.norm.weight"] = (hidden,)
    if not shape.tie_word_embeddings:
        tensors["lm_head.weight"] = (shape.vocab_size, hidden)
    return tensors


def _mlp(prefix: str, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    return {
        prefix + "gate_proj.weight": (width, hidden),
        prefix + "up_proj.weight": (width, hidden),
        prefix + "down_proj.weight": (hidden, width),
    }
