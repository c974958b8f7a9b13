"""What a checkpoint's `config.json` says of a decoder, family by family in the same words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TensorNames:
    """What a checkpoint calls the tensors of a layer's MLP, below `model.layers.N.`.

    The names of everything else (attention, norms, embedding, head) are the same in every family.
    """

    router: str = "mlp.gate.weight"
    correction_bias: str = "mlp.gate.e_score_correction_bias"
    experts: str = "mlp.experts."
    """What stands before an expert's number, and the number before its projections."""
    gate: str = "gate_proj.weight"
    up: str = "up_proj.weight"
    down: str = "down_proj.weight"
    """The projections of an expert; those of a dense MLP and of shared experts have the defaults everywhere."""
    shared_experts: str = "mlp.shared_experts."


@dataclass(frozen=True)
class RopeScaling:
    """Rotary embedding stretched for long contexts as Llama 3.1's (`rope_type: llama3`); keys as in `config.json`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelShape:
    """What of `config.json` is used here, names as in transformers' `Qwen3MoeConfig` where it has them."""

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    """Of a dense MLP; 0 where no layer has one."""
    moe_intermediate_size: int
    """Of an expert; 0 in a dense model, as the number of experts."""
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    is_moe_layer: tuple[bool, ...]
    """Per layer: MoE or dense."""
    model_type: str = "qwen3_moe"
    architecture: str = "Qwen3MoeForCausalLM"
    dtype: str = "float32"
    """What the folder's weights are stored in, as torch names it."""
    qk_norm: Literal["none", "head", "width"] = "head"
    """RMSNorm of queries and keys: none, over each head (weight [head_dim]), or over all heads ([heads · head_dim])."""
    qkv_bias: bool = False
    rotary_fraction: float = 1.0
    """Share of a head's channels, the first ones, that the rotary embedding turns."""
    rope_scaling: RopeScaling | None = None
    router_scores: Literal["softmax", "sigmoid"] = "softmax"
    """What a router's logits become before experts are chosen by it."""
    routed_scaling_factor: float = 1.0
    """What the chosen experts' gates are multiplied with, after they are normalised."""
    correction_bias: bool = False
    """Whether a bias per expert is added to the scores for the choice, and the choice alone (arXiv 2408.15664)."""
    shared_intermediate_size: int = 0
    """Of the experts that see every token, all together; 0: there are none."""
    num_further_layers: int = 0
    """Layers after the last one in the checkpoint, for predicting tokens further on. Neither trained nor exported."""
    names: TensorNames = TensorNames()

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have a router; the others have a dense MLP."""
        return tuple(layer for layer, is_moe in enumerate(self.is_moe_layer) if is_moe)

    @property
    def num_moe_layers(self) -> int:
        """Layers that have a router."""
        return sum(self.is_moe_layer)

    @property
    def kv_values_per_token(self) -> int:
        """Elements of one token's keys and values over all layers."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim
