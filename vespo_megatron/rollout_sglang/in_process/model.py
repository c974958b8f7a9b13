"""A cached forward of transformers' `Qwen3MoeForCausalLM`, written for many short rows, and its weights by HF name.

transformers owns the parameters, the router and the experts; what is ours is the loop over layers: rows of different
lengths without padding between prompt and response, a key-value cache that shrinks when rows finish, the experts of
every token returned, and logits only where a token is sampled.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.model_shape import read_shape
from vespo_megatron.rollout_sglang.in_process.experts import run_experts
from vespo_megatron.rollout_sglang.in_process.mismatch import AS_IT_IS, EngineMismatch, choose_experts


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The folder's `Qwen3MoeForCausalLM`, ready to generate; raises `UserError` when it is another model's."""
    from transformers import Qwen3MoeForCausalLM
    from transformers.utils import logging

    read_shape(folder)
    model: Any
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=dtype)
    finally:
        if shown:
            logging.enable_progress_bar()
    model.set_experts_implementation("grouped_mm")
    return model.to(device).eval().requires_grad_(False)


class KeyValueCache:
    """Every layer's keys and values `[layers, rows, kv_heads, capacity, head_dim]`; a token's slot is its position."""

    def __init__(self, config: Any, rows: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` slots per row; grows by half at least, so that it is rarely called for."""
        missing = capacity - self.keys.shape[3]
        if missing > 0:
            missing = max(missing, self.keys.shape[3] // 2)
            self.keys = F.pad(self.keys, (0, 0, 0, missing))
            self.values = F.pad(self.values, (0, 0, 0, missing))

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows, in this order; a row may be repeated."""
        self.keys = self.keys.index_select(1, rows)
        self.values = self.values.index_select(1, rows)


class CachedQwen3Moe:
    """Prefill and decode with a `Qwen3MoeForCausalLM`. Not thread-safe. Call it under `torch.inference_mode`.

    Raises `UserError` for what it does not compute: sliding windows and rotary scalings that depend on the length.
    """

    def __init__(self, model: Any, context_length: int, mismatch: EngineMismatch = AS_IT_IS) -> None:
        config = model.config
        if config.sliding_window is not None:
            raise UserError("sliding-window attention", where="in-process engine", fix="use the sglang backend")
        rope_type = config.rope_parameters.get("rope_type", "default")
        if rope_type not in ("default", "linear", "yarn", "llama3"):
            raise UserError(f"rope_type {rope_type!r}", where="in-process engine", fix="use the sglang backend")
        self.model, self.config, self.mismatch = model, config, mismatch
        self.device, self.dtype = model.device, model.dtype
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.scale = config.head_dim**-0.5
        self.sparse_layers = [index for index, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]
        positions = torch.arange(context_length, device=self.device)[None]
        probe = torch.empty(0, dtype=self.dtype, device=self.device)
        cos, sin = model.model.rotary_emb(probe, positions)
        self.cos, self.sin = cos[0, :, None], sin[0, :, None]
        """[context_length, 1, head_dim]"""

    def new_cache(self, rows: int, capacity: int) -> KeyValueCache:
        return KeyValueCache(self.config, rows, capacity, self.dtype, self.device)

    def prefill(
        self, ids: torch.Tensor, lengths: torch.Tensor, cache: KeyValueCache, flips: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run right-padded prompts from an empty cache.

        Args:
            ids: int64 [rows, P]; what lies beyond a row's length is computed and never looked at.
            lengths: int64 [rows].
            flips: bool [rows, P, moe_layers], see `choose_experts`.

        Returns:
            float32 logits [rows, vocabulary] after each prompt's last token, experts [rows, P, moe_layers, topk].
        """
        rows, width = ids.shape
        hidden, routes = self._whole(ids, cache, flips)
        last = hidden.view(rows, width, -1)[torch.arange(rows, device=self.device), lengths - 1]
        return self._logits(last), routes.view(rows, width, *routes.shape[1:])

    def score(self, ids: torch.Tensor, flips: torch.Tensor | None = None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Run right-padded sequences, int64 [rows, P], and look at every position; `flips` as in `prefill`.

        Returns:
            float32 logits [rows, P, vocabulary], and every layer's output [rows, P, hidden size].
        """
        rows, width = ids.shape
        outputs: list[torch.Tensor] = []
        hidden, _ = self._whole(ids, self.new_cache(rows, width), flips, outputs)
        return self._logits(hidden).view(rows, width, -1), [each.view(rows, width, -1) for each in outputs]

    def _whole(
        self,
        ids: torch.Tensor,
        cache: KeyValueCache,
        flips: torch.Tensor | None,
        outputs: list[torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`_layers` of right-padded sequences from an empty cache, all of them in one flat run."""
        rows, width = ids.shape

        def attend(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            query, key, value = (
                part.view(rows, width, -1, part.shape[-1]).transpose(1, 2) for part in (query, key, value)
            )
            cache.keys[layer, :, :, :width] = key
            cache.values[layer, :, :, :width] = value
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True, scale=self.scale)
            return mixed.transpose(1, 2).reshape(rows * width, -1)

        positions = torch.arange(width, device=self.device).expand(rows, width).reshape(-1)
        flat = None if flips is None else flips.flatten(0, 1)
        return self._layers(ids.reshape(-1), positions, attend, flat, outputs)

    def decode(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        longest: int,
        cache: KeyValueCache,
        flips: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one token per row.

        Args:
            ids: int64 [rows].
            positions: int64 [rows], the slot each token takes.
            longest: the largest position plus one.
            flips: bool [rows, moe_layers], see `choose_experts`.

        Returns:
            float32 logits [rows, vocabulary], experts [rows, moe_layers, topk].
        """
        rows = len(ids)
        cache.reserve(longest)
        row_index = torch.arange(rows, device=self.device)
        hidden_slots = torch.arange(longest, device=self.device)[None] > positions[:, None]
        bias = torch.zeros(rows, 1, 1, longest, dtype=self.dtype, device=self.device)
        bias.masked_fill_(hidden_slots[:, None, None], float("-inf"))

        def attend(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            keys, values = cache.keys[layer], cache.values[layer]
            keys[row_index, :, positions] = key
            values[row_index, :, positions] = value
            heads = rows * keys.shape[1]
            keys, values = (part[:, :, :longest].reshape(heads, longest, -1) for part in (keys, values))
            scores = torch.bmm(query.reshape(heads, self.groups, -1), keys.transpose(1, 2)).mul_(self.scale)
            scores = scores.view(rows, -1, self.groups, longest).add_(bias)
            weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(self.dtype)
            return torch.bmm(weights.view(heads, self.groups, longest), values).view(rows, -1)

        hidden, routes = self._layers(ids, positions, attend, flips)
        return self._logits(hidden), routes

    def _layers(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        attend: Callable[..., torch.Tensor],
        flips: torch.Tensor | None,
        outputs: list[torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Final hidden states [tokens, hidden] and experts [tokens, moe_layers, topk] of a flat run of tokens.

        `outputs` is given what each layer hands on, [tokens, hidden].
        """
        model, rounded, cached = self.model.model, self.mismatch.linear_input, self.mismatch.cached
        num_tokens, head_dim = len(ids), self.config.head_dim
        cos, sin = self.cos[positions], self.sin[positions]
        hidden = F.embedding(ids, model.embed_tokens.weight)
        routes: list[torch.Tensor] = []
        for index, layer in enumerate(model.layers):
            attention = layer.self_attn
            normed = rounded(self._norm(layer.input_layernorm, hidden))
            query = self._norm(attention.q_norm, attention.q_proj(normed).view(num_tokens, -1, head_dim))
            key = self._norm(attention.k_norm, attention.k_proj(normed).view(num_tokens, -1, head_dim))
            value = attention.v_proj(normed).view(num_tokens, -1, head_dim)
            mixed = attend(index, _rotate(query, cos, sin), cached(_rotate(key, cos, sin)), cached(value))
            hidden = hidden + attention.o_proj(rounded(mixed))
            normed = self._norm(layer.post_attention_layernorm, hidden)
            if hasattr(layer.mlp, "experts"):
                flip = None if flips is None else flips[:, len(routes)]
                weights, experts = choose_experts(layer.mlp.gate, normed, flip)
                routes.append(experts)
                inner = None if self.mismatch.activations == "none" else rounded
                hidden = hidden + run_experts(layer.mlp.experts, rounded(normed), experts, weights, inner)
            elif self.mismatch.activations == "none":
                hidden = hidden + layer.mlp(normed)
            else:
                normed, mlp = rounded(normed), layer.mlp
                hidden = hidden + mlp.down_proj(rounded(mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed)))
            if outputs is not None:
                outputs.append(hidden)
        stacked = torch.stack(routes, dim=1) if routes else ids.new_zeros(num_tokens, 0, 0)
        return self._norm(model.norm, hidden), stacked

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.lm_head(hidden).float()

    def _norm(self, module: Any, hidden: torch.Tensor) -> torch.Tensor:
        if self.dtype is not torch.float32:
            return module(hidden)  # it rounds between the two multiplications, which the fused form does not
        return F.rms_norm(hidden, module.weight.shape, module.weight, module.variance_epsilon)


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of `[tokens, heads, head_dim]`."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin


def weight_views(model: Any) -> dict[str, torch.Tensor]:
    """Every tensor of a Qwen3-MoE checkpoint as a view into the model, by its name on disk.

    transformers 5 keeps a layer's experts in two tensors; checkpoints and weight sync name them one by one.
    """
    views: dict[str, torch.Tensor] = {}
    tied = bool(model.config.tie_word_embeddings)
    for name, parameter in model.named_parameters():
        if tied and name == "lm_head.weight":
            continue
        stem, _, kind = name.rpartition(".")
        if not stem.endswith(".experts"):
            views[name] = parameter.data
            continue
        for expert, weight in enumerate(parameter.data):
            if kind == "gate_up_proj":
                gate, up = weight.chunk(2)
                views[f"{stem}.{expert}.gate_proj.weight"] = gate
                views[f"{stem}.{expert}.up_proj.weight"] = up
            else:
                views[f"{stem}.{expert}.{kind}.weight"] = weight
    return views
