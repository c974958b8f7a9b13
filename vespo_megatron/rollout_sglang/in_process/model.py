"""A cached forward of transformers' decoders, written for many short rows, and their weights by HF name.

transformers owns the parameters, the router and the experts; what is ours is the loop over layers: rows of different
lengths without padding between prompt and response, a key-value cache that shrinks when rows finish, the experts of
every token returned, and logits only where a token is sampled.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from vespo_megatron.families.shape import ModelShape
from vespo_megatron.rollout_sglang.in_process.experts import run_experts
from vespo_megatron.rollout_sglang.in_process.mismatch import AS_IT_IS, EngineMismatch, choose_experts


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The folder's model as transformers has it, ready to generate."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    model: Any
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    finally:
        if shown:
            logging.enable_progress_bar()
    if any(name.endswith(".experts") for name, _ in model.named_modules()):
        model.set_experts_implementation("grouped_mm")
    return model.to(device).eval().requires_grad_(False)


class KeyValueCache:
    """Every layer's keys and values `[layers, rows, kv_heads, capacity, head_dim]`; a token's slot is its position."""

    def __init__(self, shape: ModelShape, rows: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        sizes = (shape.num_hidden_layers, rows, shape.num_key_value_heads, capacity, shape.head_dim)
        self.keys = torch.zeros(sizes, dtype=dtype, device=device)
        self.values = torch.zeros(sizes, dtype=dtype, device=device)

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


class CachedDecoder:
    """Prefill and decode with transformers' model of this shape. Not thread-safe. Use it in `torch.inference_mode`."""

    def __init__(self, model: Any, shape: ModelShape, context_length: int, mismatch: EngineMismatch = AS_IT_IS) -> None:
        self.model, self.shape, self.mismatch = model, shape, mismatch
        self.device, self.dtype = model.device, model.dtype
        self.groups = shape.num_attention_heads // shape.num_key_value_heads
        self.scale = shape.head_dim**-0.5
        positions = torch.arange(context_length, device=self.device)[None]
        probe = torch.empty(0, dtype=self.dtype, device=self.device)
        cos, sin = model.model.rotary_emb(probe, positions)
        self.cos, self.sin = cos[0, :, None], sin[0, :, None]
        """[context_length, 1, rotary_dim]"""

    def new_cache(self, rows: int, capacity: int) -> KeyValueCache:
        return KeyValueCache(self.shape, rows, capacity, self.dtype, self.device)

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
        num_tokens = len(ids)
        cos, sin = self.cos[positions], self.sin[positions]
        hidden = F.embedding(ids, model.embed_tokens.weight)
        routes: list[torch.Tensor] = []
        for index, layer in enumerate(model.layers):
            attention = layer.self_attn
            normed = rounded(self._norm(layer.input_layernorm, hidden))
            query = self._heads(attention.q_proj(normed), getattr(attention, "q_norm", None))
            key = self._heads(attention.k_proj(normed), getattr(attention, "k_norm", None))
            value = attention.v_proj(normed).view(num_tokens, -1, self.shape.head_dim)
            mixed = attend(index, _rotate(query, cos, sin), cached(_rotate(key, cos, sin)), cached(value))
            hidden = hidden + attention.o_proj(rounded(mixed))
            normed = self._norm(layer.post_attention_layernorm, hidden)
            if self.shape.is_moe_layer[index]:
                flip = None if flips is None else flips[:, len(routes)]
                weights, experts = choose_experts(layer.mlp.gate, normed, self.shape, flip)
                routes.append(experts)
                inner = None if self.mismatch.activations == "none" else rounded
                hidden = hidden + run_experts(layer.mlp.experts, rounded(normed), experts, weights, inner)
                if self.shape.shared_intermediate_size:
                    hidden = hidden + self._dense(layer.mlp.shared_experts, normed)
            else:
                hidden = hidden + self._dense(layer.mlp, normed)
            if outputs is not None:
                outputs.append(hidden)
        stacked = torch.stack(routes, dim=1) if routes else ids.new_zeros(num_tokens, 0, 0)
        return self._norm(model.norm, hidden), stacked

    def _heads(self, projected: torch.Tensor, norm: Any) -> torch.Tensor:
        """Queries or keys [tokens, heads, head_dim] of [tokens, heads · head_dim], normed as the family norms them."""
        rows = (len(projected), -1, self.shape.head_dim)
        if self.shape.qk_norm == "none":
            return projected.view(rows)
        if self.shape.qk_norm == "width":
            return self._norm(norm, projected).view(rows)
        return self._norm(norm, projected.view(rows))

    def _dense(self, mlp: Any, normed: torch.Tensor) -> torch.Tensor:
        if self.mismatch.activations == "none":
            return mlp(normed)
        rounded = self.mismatch.linear_input
        normed = rounded(normed)
        return mlp.down_proj(rounded(mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed)))

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.lm_head(hidden).float()

    def _norm(self, module: Any, hidden: torch.Tensor) -> torch.Tensor:
        if self.dtype is not torch.float32:
            return module(hidden)  # it rounds between the two multiplications, which the fused form does not
        return F.rms_norm(hidden, module.weight.shape, module.weight, module.variance_epsilon)


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of `[tokens, heads, head_dim]`, of as many first channels as there are angles."""
    turned, kept = states[..., : cos.shape[-1]], states[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, kept), dim=-1) if kept.shape[-1] else turned


def weight_views(model: Any, shape: ModelShape) -> dict[str, torch.Tensor]:
    """Every tensor of the model's checkpoint as a view into it, by its name on disk.

    transformers 5 keeps a layer's experts in two tensors, `mlp.experts.gate_up_proj` and `down_proj`; checkpoints and
    weight sync name them one by one, as the family does.
    """
    names, views = shape.names, {}
    own = {"mlp.gate.weight": names.router, "mlp.gate.e_score_correction_bias": names.correction_bias}
    saved = model.state_dict()
    for name in saved:
        if shape.tie_word_embeddings and name == "lm_head.weight":
            continue
        layer, inside = _in_layer(name)
        if inside == "mlp.experts.gate_up_proj":
            for expert, weight in enumerate(saved[name]):
                prefix = f"{layer}{names.experts}{expert}."
                views[prefix + names.gate], views[prefix + names.up] = weight.chunk(2)
        elif inside == "mlp.experts.down_proj":
            for expert, weight in enumerate(saved[name]):
                views[f"{layer}{names.experts}{expert}.{names.down}"] = weight
        else:
            views[layer + own.get(inside, inside)] = saved[name]
    return views


def _in_layer(name: str) -> tuple[str, str]:
    """`model.layers.3.mlp.gate.weight` → `model.layers.3.` and the rest; another name → nothing and all of it."""
    match = re.match(r"model\.layers\.\d+\.", name)
    return (match[0], name[match.end() :]) if match else ("", name)
