"""What a recipe asks of its model that this model cannot do: sizes that do not divide, a context that is too short."""

from __future__ import annotations

import json
from collections.abc import Iterator

from vespo_megatron.errors import UserError
from vespo_megatron.families.shape import ModelShape
from vespo_megatron.recipe.schema import MAX_SAMPLING_MASK_TOKENS, MegatronConfig, Recipe

_MEGATRON, _GENERATION = "policy.megatron_cfg", "policy.generation"


def model_problems(recipe: Recipe, shape: ModelShape) -> Iterator[UserError]:
    """What the recipe asks of its model that this model cannot do."""
    megatron, folder = recipe.policy.megatron_cfg, recipe.policy.model_name
    tensor, expert, expert_tensor = (
        megatron.tensor_model_parallel_size,
        megatron.expert_model_parallel_size,
        megatron.expert_tensor_parallel_size,
    )
    divisions = [
        (shape.num_attention_heads, "attention heads", tensor, f"TP {tensor}", "tensor_model_parallel_size"),
        (shape.num_key_value_heads, "key/value heads", tensor, f"TP {tensor}", "tensor_model_parallel_size"),
        (shape.num_experts, "experts", expert, f"EP {expert}", "expert_model_parallel_size"),
        (
            shape.moe_intermediate_size,
            "channels of an expert",
            expert_tensor,
            f"ETP {expert_tensor}",
            "expert_tensor_parallel_size",
        ),
    ]
    dense_size = shape.intermediate_size if shape.num_moe_layers < shape.num_hidden_layers else 0
    for size, what in ((dense_size, "a dense MLP"), (shape.shared_intermediate_size, "the shared experts")):
        divisions.append((size, f"channels of {what}", tensor, f"TP {tensor}", "tensor_model_parallel_size"))
    for count, what, parts, split, name in divisions:
        if count % parts:
            divisors = ", ".join(str(size) for size in range(1, min(count, 64) + 1) if count % size == 0)
            yield UserError(
                f"the {count} {what} of {folder} cannot be split into {split}",
                where=f"{_MEGATRON}.{name}",
                expected=f"a divisor of {count} ({divisors})",
            )
    yield from _routers(recipe, shape)
    yield from _layer_split(megatron, shape.num_hidden_layers, folder)
    limit, longest = shape.max_position_embeddings, recipe.policy.max_total_sequence_length
    if longest > limit:
        yield UserError(
            f"is {longest}",
            where="policy.max_total_sequence_length",
            expected=f"at most {limit}, the context of {folder}",
        )
    generation = recipe.policy.generation
    top_k = shape.vocab_size if generation.top_k in (None, -1) else generation.top_k
    truncates = generation.top_p < 1 or generation.min_p > 0 or generation.top_k not in (None, -1)
    if generation.backend == "sglang" and truncates and top_k > MAX_SAMPLING_MASK_TOKENS:
        yield UserError(
            f"is {generation.top_k} with top_p {generation.top_p}, min_p {generation.min_p}; SGLang tells what a token "
            f"was drawn from only where that is at most {MAX_SAMPLING_MASK_TOKENS} tokens, and without it "
            "π cannot be taken over the same",
            where=f"{_GENERATION}.top_k",
            expected=f"1 to {MAX_SAMPLING_MASK_TOKENS} where sampling truncates",
            fix=f"set it to {MAX_SAMPLING_MASK_TOKENS} beside top_p or min_p, "
            "or top_p to 1.0, min_p to 0 and top_k to null",
        )
    yield from _route_flips(recipe, shape)
    for token in generation.stop_token_ids:
        if not 0 <= token < shape.vocab_size:
            yield UserError(
                f"holds {token}",
                where=f"{_GENERATION}.stop_token_ids",
                expected=f"ids below {folder}'s {shape.vocab_size}",
            )


def _routers(recipe: Recipe, shape: ModelShape) -> Iterator[UserError]:
    """What is asked of routers that the model has not, or not so."""
    megatron, folder = recipe.policy.megatron_cfg, recipe.policy.model_name
    if megatron.moe_router_bias_update_rate and not shape.correction_bias:
        yield UserError(
            f"is {megatron.moe_router_bias_update_rate:g}, but routers of {folder} have no correction bias",
            where=f"{_MEGATRON}.moe_router_bias_update_rate",
            expected="0, or a model whose routers have one",
        )
    if shape.num_moe_layers:
        return
    asked = {
        "loss_fn.router_shift.apply": (recipe.loss_fn.router_shift.apply, "none"),
        "policy.router_replay.mode": (recipe.policy.router_replay.mode, "none"),
        f"{_GENERATION}.sglang_cfg.enable_return_routed_experts": (
            recipe.policy.generation.sglang_cfg.enable_return_routed_experts,
            False,
        ),
        f"{_MEGATRON}.moe_aux_loss_coeff": (megatron.moe_aux_loss_coeff, 0),
        f"{_MEGATRON}.moe_z_loss_coeff": (megatron.moe_z_loss_coeff, None),
        f"{_MEGATRON}.expert_model_parallel_size": (megatron.expert_model_parallel_size, 1),
        f"{_MEGATRON}.expert_tensor_parallel_size": (megatron.expert_tensor_parallel_size, 1),
    }
    for where, (value, off) in asked.items():
        if value != off:
            yield UserError(
                f"is {value}, but {folder} has no routers",
                where=where,
                expected=json.dumps(off).strip('"') + ", or a model with routers",
            )


def _route_flips(recipe: Recipe, shape: ModelShape) -> Iterator[UserError]:
    mismatch, folder = recipe.policy.generation.mismatch, recipe.policy.model_name
    where = f"{_GENERATION}.mismatch.route_flip"
    if mismatch.route_flip and (not shape.num_moe_layers or shape.num_experts_per_tok == shape.num_experts):
        yield UserError(
            f"is {mismatch.route_flip:g}, but {folder} has no next-best expert",
            where=where,
            expected="0, or a model whose routers leave experts out",
        )
    elif wrong := set(mismatch.route_flip_layers or ()) - set(shape.moe_layers):
        yield UserError(
            f"holds {min(wrong)}",
            where=f"{where}_layers",
            expected=f"MoE layers of {folder}: {', '.join(map(str, shape.moe_layers))}",
        )


def _layer_split(megatron: MegatronConfig, layers: int, folder: str) -> Iterator[UserError]:
    """Every pipeline stage has the same layers, apart from a first and a last one of given size."""
    pipeline = megatron.pipeline_model_parallel_size
    virtual = megatron.virtual_pipeline_model_parallel_size or 1
    first, last = megatron.num_layers_in_first_pipeline_stage, megatron.num_layers_in_last_pipeline_stage
    given = [count for count in (first, last) if count is not None]
    where = f"{_MEGATRON}.pipeline_model_parallel_size"
    if pipeline == 1:
        if given:
            yield UserError(
                "is 1, but layers of a first or last pipeline stage are given", where=where, fix="leave them out"
            )
        return
    rest, stages = layers - sum(given), pipeline - len(given)
    per_stage, over = divmod(rest, stages) if stages else (0, rest)
    uneven = over != 0 or (stages > 0 and per_stage < 1)
    if uneven:
        split = f"PP {pipeline}" + (f" with {' and '.join(map(str, given))} in the outer stages" if given else "")
        yield UserError(
            f"the {layers} layers of {folder} cannot be split into {split}",
            where=where,
            expected=f"a divisor of {layers} ({', '.join(str(n) for n in range(1, layers + 1) if layers % n == 0)})",
            fix="change it, or set num_layers_in_first_pipeline_stage or num_layers_in_last_pipeline_stage",
        )
        return
    for count in {per_stage, *given} if stages else set(given):
        if count % virtual:
            yield UserError(
                f"the {count} layers of a stage cannot be split into VPP {virtual} chunks",
                where=f"{_MEGATRON}.virtual_pipeline_model_parallel_size",
                expected=f"a divisor of {count}",
            )
            return
