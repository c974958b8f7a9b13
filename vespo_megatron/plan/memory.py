"""Memory of a trainer process and of a server, by what it is for, in bytes.

Checked against what the tiny model really allocates in every layout (tests/parallel/test_memory_model.py).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from vespo_megatron.families.shape import ModelShape
from vespo_megatron.plan import activations
from vespo_megatron.plan.layers import stage_layers
from vespo_megatron.recipe.schema import Recipe


@dataclass(frozen=True)
class Parameters:
    """Of one process: what every data parallel rank holds, and what is split over expert parallel ranks."""

    dense: int
    expert: int

    @property
    def total(self) -> int:
        return self.dense + self.expert


def parameters(shape: ModelShape) -> Parameters:
    """Of the whole model."""
    sparse, layers = shape.num_moe_layers, shape.num_hidden_layers
    layer = _attention(shape, tensor=1, kv_heads=shape.num_key_value_heads) + 2 * shape.hidden_size
    dense = layers * layer + sparse * _beside_experts(shape, tensor=1)
    dense += (layers - sparse) * 3 * shape.hidden_size * shape.intermediate_size
    embeddings = 1 if shape.tie_word_embeddings else 2
    dense += embeddings * shape.vocab_size * shape.hidden_size + shape.hidden_size
    return Parameters(dense, sparse * shape.num_experts * 3 * shape.hidden_size * shape.moe_intermediate_size)


def local_parameters(shape: ModelShape, recipe: Recipe, stage: int = 0) -> Parameters:
    """Of one process of pipeline stage `stage` (0-based)."""
    megatron = recipe.policy.megatron_cfg
    tp, pp = megatron.tensor_model_parallel_size, megatron.pipeline_model_parallel_size
    ep, etp = megatron.expert_model_parallel_size, megatron.expert_tensor_parallel_size
    hidden, layers = shape.hidden_size, stage_layers(shape, recipe)[stage]
    sparse = (
        layers
        if shape.num_moe_layers == shape.num_hidden_layers
        else round(layers * shape.num_moe_layers / shape.num_hidden_layers)
    )
    layer = _attention(shape, tensor=tp, kv_heads=max(1, shape.num_key_value_heads // tp)) + 2 * hidden
    dense = layers * layer + sparse * _beside_experts(shape, tensor=tp)
    dense += (layers - sparse) * 3 * hidden * shape.intermediate_size // tp
    padded = -(-shape.vocab_size // tp) * tp
    if stage == 0:
        dense += padded // tp * hidden
    if stage == pp - 1:
        dense += hidden + (0 if shape.tie_word_embeddings and pp == 1 else padded // tp * hidden)
    expert = sparse * shape.num_experts // ep * 3 * hidden * shape.moe_intermediate_size // etp
    return Parameters(dense, expert)


def _attention(shape: ModelShape, *, tensor: int, kv_heads: int) -> int:
    """Of one layer, with `kv_heads` heads of keys on a tensor parallel rank."""
    hidden, dim, heads = shape.hidden_size, shape.head_dim, shape.num_attention_heads // tensor
    norms = {"none": 0, "head": 2 * dim, "width": (heads + kv_heads) * dim}[shape.qk_norm]
    projected = (heads + 2 * kv_heads) * dim
    return hidden * projected + (projected if shape.qkv_bias else 0) + heads * dim * hidden + norms


def _beside_experts(shape: ModelShape, *, tensor: int) -> int:
    """Of one MoE layer: the router, its correction bias, and a tensor parallel rank's part of the shared experts."""
    router = shape.num_experts * (shape.hidden_size + int(shape.correction_bias))
    return router + 3 * shape.hidden_size * shape.shared_intermediate_size // tensor


@dataclass(frozen=True)
class TrainerMemory:
    """Of the largest process, in bytes."""

    weights: int
    gradients: int
    optimizer: int
    """On the device; what is offloaded is in `host`."""
    activations: int
    logits: int
    routes: int
    host: int
    """Of the optimizer, what is offloaded: float32 weights and moments, and a copy of their gradients."""
    weight_copies: int
    """On the host: earlier weight versions, the reference, and the policy's own while others are in use."""

    @property
    def device(self) -> int:
        """Sum of what lies on the device."""
        return sum(getattr(self, field.name) for field in fields(self) if field.name not in ("host", "weight_copies"))


def trainer_memory(shape: ModelShape, recipe: Recipe) -> TrainerMemory:
    """Of the process that needs most."""
    stages = recipe.policy.megatron_cfg.pipeline_model_parallel_size
    return max((_stage_memory(shape, recipe, stage) for stage in range(stages)), key=lambda memory: memory.device)


def _stage_memory(shape: ModelShape, recipe: Recipe, stage: int) -> TrainerMemory:
    policy, megatron = recipe.policy, recipe.policy.megatron_cfg
    local = local_parameters(shape, recipe, stage)
    element = activations.element_size(recipe)
    gradient = 4 if megatron.distributed_data_parallel_config.grad_reduce_in_fp32 or element == 4 else 2
    optimizer = optimizer_bytes(recipe, local)
    offloaded = int(optimizer * megatron.optimizer.optimizer_offload_fraction)
    if not megatron.optimizer.optimizer_cpu_offload:
        offloaded = 0
    tokens = micro_batch_tokens(recipe) // megatron.context_parallel_size
    layers = stage_layers(shape, recipe)[stage]
    chosen, number = tokens * layers * shape.num_experts_per_tok, 1 if shape.num_experts <= 256 else 2
    routes = chosen * number if policy.router_replay.mode != "none" else 0
    if recipe.loss_fn.router_shift.apply != "none":
        routes += chosen * (number + 4)  # which experts, and their log-probs
    last = stage == megatron.pipeline_model_parallel_size - 1
    return TrainerMemory(
        weights=local.total * element,
        gradients=local.total * gradient,
        optimizer=optimizer - offloaded,
        activations=activations.peak(shape, recipe, tokens, stage),
        logits=min(megatron.logprob_memory_mb << 20, tokens * shape.vocab_size * 4) if last else 0,
        routes=routes,
        host=offloaded * 4 // 3,
        weight_copies=local.total * element * weight_copies(recipe),
    )


def weight_copies(recipe: Recipe) -> int:
    """How often a trainer process holds its weights in host memory.

    Its own are copied out when others take their place, unless the newest version is a copy of them; and once more in
    passes with rounded weights.
    """
    reference = recipe.loss_fn.reference_policy_kl_penalty != 0
    updated = recipe.held_versions > 0 and recipe.grpo.async_grpo.sync_every > 1
    return (
        recipe.held_versions + int(reference) + int(reference or updated) + int(recipe.policy.quantization.in_training)
    )


def micro_batch_tokens(recipe: Recipe) -> int:
    """The largest training micro-batch, before it is split over context parallel ranks."""
    policy = recipe.policy
    if policy.sequence_packing.enabled:
        return policy.sequence_packing.train_mb_tokens
    return policy.train_micro_batch_size * policy.max_total_sequence_length


def optimizer_bytes(recipe: Recipe, local: Parameters) -> int:
    """Adam's two moments in float32, and float32 weights beside 16-bit ones."""
    per_parameter = 12 if recipe.policy.in_16_bits else 8
    if not recipe.policy.megatron_cfg.optimizer.use_distributed_optimizer:
        return per_parameter * local.total
    megatron = recipe.policy.megatron_cfg
    world, pp = recipe.world_size, megatron.pipeline_model_parallel_size
    dense_ranks = world // (megatron.tensor_model_parallel_size * pp)  # data and context parallel
    expert_ranks = world // (megatron.expert_tensor_parallel_size * megatron.expert_model_parallel_size * pp)
    return per_parameter * (local.dense // dense_ranks + local.expert // max(1, expert_ranks))
