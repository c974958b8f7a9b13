"""What a recipe may not ask for, found before any process starts, with a message that says what to change.

Pure: `problems` looks at the recipe alone, `model_problems` at the model's `config.json` besides. Neither imports
torch, megatron-core or transformers. Names that tables own (objectives, estimators, rewards) are checked there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.loader import flatten
from vespo_megatron.recipe.model_config import read_model_config
from vespo_megatron.recipe.schema import MAX_SAMPLING_MASK_TOKENS, MegatronConfig, Recipe

_MEGATRON, _GENERATION = "policy.megatron_cfg", "policy.generation"

CHOICES: dict[str, tuple[str | None, ...]] = {
    "policy.precision": ("float32", "bfloat16"),
    f"{_MEGATRON}.layer_spec": ("auto", "te", "native"),
    f"{_MEGATRON}.recompute_granularity": (None, "full", "selective"),
    f"{_MEGATRON}.moe_router_dtype": (None, "fp32", "fp64"),
    f"{_MEGATRON}.moe_token_dispatcher_type": ("alltoall", "allgather", "flex"),
    f"{_MEGATRON}.optimizer.optimizer": ("adam", "sgd"),
    f"{_MEGATRON}.scheduler.lr_decay_style": ("constant", "linear", "cosine", "inverse-square-root", "WSD"),
    "policy.router_replay.mode": ("none", "R2", "R3"),
    "policy.router_replay.on_stale_routes": ("live", "drop", "error"),
    f"{_GENERATION}.backend": ("sglang", "in_process"),
    f"{_GENERATION}.sglang_cfg.weight_transport": ("distributed", "tensor", "disk"),
    f"{_GENERATION}.sglang_cfg.dtype": ("auto", "float32", "bfloat16", "float16"),
    "loss_fn.behavior": ("rollout", "recompute"),
    "loss_fn.ess_learning_rate": ("none", "sqrt", "linear"),
    "loss_fn.on_bad_sample": ("error", "drop"),
    "loss_fn.reference_policy_kl_type": ("k1", "k2", "k3"),
    "data.on_long_prompt": ("error", "drop"),
    "grpo.async_grpo.on_weight_update": ("abort_and_continue", "in_place", "drain"),
    "guard.on_collapse": ("warn", "stop"),
    "cluster.device": ("auto", "cuda", "cpu"),
}

AT_LEAST_ONE = (
    "grpo.num_prompts_per_step",
    "grpo.reward_shaping.overlong_buffer_length",
    "grpo.reward_shaping.max_response_length",
    "grpo.num_generations_per_prompt",
    "grpo.max_num_steps",
    "grpo.async_grpo.sync_every",
    "grpo.max_num_epochs",
    "grpo.max_val_samples",
    "grpo.val_num_generations",
    "policy.train_global_batch_size",
    "policy.train_micro_batch_size",
    "policy.logprob_batch_size",
    "policy.max_total_sequence_length",
    f"{_MEGATRON}.tensor_model_parallel_size",
    f"{_MEGATRON}.pipeline_model_parallel_size",
    f"{_MEGATRON}.virtual_pipeline_model_parallel_size",
    f"{_MEGATRON}.num_layers_in_first_pipeline_stage",
    f"{_MEGATRON}.num_layers_in_last_pipeline_stage",
    f"{_MEGATRON}.context_parallel_size",
    f"{_MEGATRON}.expert_model_parallel_size",
    f"{_MEGATRON}.expert_tensor_parallel_size",
    f"{_MEGATRON}.logprob_memory_mb",
    "policy.sequence_packing.train_mb_tokens",
    "policy.sequence_packing.logprob_mb_tokens",
    f"{_GENERATION}.max_new_tokens",
    f"{_GENERATION}.sglang_cfg.num_servers",
    f"{_GENERATION}.sglang_cfg.tensor_parallel_size",
    f"{_GENERATION}.sglang_cfg.max_concurrent_requests",
    f"{_GENERATION}.sglang_cfg.weight_bucket_bytes",
    "data.max_input_seq_length",
    "data.train.max_samples",
    "data.validation.max_samples",
    "env.num_workers",
    "guard.max_skipped_updates",
    "guard.window",
    "checkpointing.keep_top_k",
    "checkpointing.keep_last",
    "cluster.gpus_per_node",
    "cluster.num_nodes",
)
"""Counts; those that may be null are checked when they are not."""

POSITIVE = (
    f"{_MEGATRON}.distributed_timeout",
    f"{_MEGATRON}.optimizer.lr",
    f"{_GENERATION}.sglang_cfg.startup_timeout",
    f"{_GENERATION}.sglang_cfg.request_timeout",
    f"{_GENERATION}.sglang_cfg.recovery_timeout",
    "env.timeout",
    "checkpointing.timeout",
    "loss_fn.ess_base",
    "guard.reward_drop",
    "guard.length_drop",
    "guard.truncated_share",
    "guard.entropy_drop",
    "guard.loss_spike",
)

NOT_NEGATIVE = (
    f"{_GENERATION}.sglang_cfg.health_timeout",
    f"{_GENERATION}.sglang_cfg.max_restarts",
    "grpo.val_period",
    "grpo.async_grpo.max_staleness",
    "grpo.async_grpo.staleness_threshold",
    "grpo.seed",
    "checkpointing.save_period",
    "logger.num_val_samples_to_print",
    "logger.profile_step",
    "guard.max_bundles",
    "cluster.watchdog_timeout",
    "cluster.stop_timeout",
    "loss_fn.reference_policy_kl_penalty",
    f"{_MEGATRON}.optimizer.weight_decay",
    f"{_MEGATRON}.optimizer.clip_grad",
    f"{_MEGATRON}.scheduler.lr_warmup_iters",
)

NEED_TRANSFORMER_ENGINE = ("moe_permute_fusion", "apply_rope_fusion")


def validate(recipe: Recipe) -> None:
    """Raise `UserError` with everything that is wrong with the recipe and with what it asks of its model."""
    found = list(problems(recipe))
    if not found:
        found = list(model_problems(recipe, read_model_config(recipe.policy.model_name)))
    if len(found) == 1:
        raise found[0]
    if found:
        raise UserError(f"the recipe has {len(found)} problems\n" + "\n".join(str(problem) for problem in found))


# ---- the recipe alone --------------------------------------------------------------------------------------------


def problems(recipe: Recipe) -> Iterator[UserError]:
    """What is wrong with a recipe, whatever its model. Values out of range are all there is when there are any."""
    out_of_range = list(_out_of_range(recipe))
    if out_of_range:
        yield from out_of_range
        return
    yield from _parallel_layout(recipe)
    yield from _batch_sizes(recipe)
    yield from _lengths(recipe)
    yield from _sampling(recipe)
    yield from _combinations(recipe)
    yield from _asynchronous(recipe)


def _out_of_range(recipe: Recipe) -> Iterator[UserError]:
    values = flatten(recipe)
    for name, choices in CHOICES.items():
        if values[name] not in choices:
            known = ", ".join("null" if choice is None else choice for choice in choices)
            yield UserError(f"is {values[name]!r}", where=name, expected=f"one of {known}")
    bounds = ((AT_LEAST_ONE, 1, "at least 1"), (NOT_NEGATIVE, 0, "at least 0"))
    for names, least, expected in bounds:
        for name in names:
            if values[name] is not None and values[name] < least:
                yield UserError(f"is {values[name]}", where=name, expected=expected)
    for name in POSITIVE:
        if values[name] is not None and not values[name] > 0:
            yield UserError(f"is {values[name]}", where=name, expected="more than 0")


def _parallel_layout(recipe: Recipe) -> Iterator[UserError]:
    megatron, world = recipe.policy.megatron_cfg, recipe.world_size
    tensor, pipeline = megatron.tensor_model_parallel_size, megatron.pipeline_model_parallel_size
    context, expert = megatron.context_parallel_size, megatron.expert_model_parallel_size
    expert_tensor, virtual = megatron.expert_tensor_parallel_size, megatron.virtual_pipeline_model_parallel_size
    dense = tensor * pipeline * context
    if world % dense:
        yield UserError(
            f"{world} trainer processes ({recipe.cluster.num_nodes} × {recipe.cluster.gpus_per_node}) cannot be split "
            f"into TP {tensor} × PP {pipeline} × CP {context} = {dense}",
            where="cluster",
            expected=f"a multiple of {dense}",
            fix=f"use {_round_up(world, dense)} processes (cluster.gpus_per_node), or lower a parallel size",
        )
    experts = expert_tensor * expert * pipeline
    if world % experts:
        yield UserError(
            f"{world} trainer processes cannot be split into ETP {expert_tensor} × EP {expert} × PP {pipeline} "
            f"= {experts}",
            where=f"{_MEGATRON}.expert_model_parallel_size",
            expected=f"ETP × EP × PP that divides {world}",
            fix=f"lower it, or use {_round_up(world, experts)} processes",
        )
    if megatron.sequence_parallel and tensor == 1:
        yield UserError(
            "is true with tensor_model_parallel_size 1",
            where=f"{_MEGATRON}.sequence_parallel",
            fix="set it to false, or raise tensor_model_parallel_size",
        )
    if tensor > 1 and not megatron.sequence_parallel:
        yield UserError(
            f"is false with tensor_model_parallel_size {tensor}; megatron-core trains MoE with TP only with both",
            where=f"{_MEGATRON}.sequence_parallel",
            fix="set it to true",
        )
    if virtual is not None and (pipeline == 1 or virtual == 1):
        yield UserError(
            f"is {virtual} with pipeline_model_parallel_size {pipeline}",
            where=f"{_MEGATRON}.virtual_pipeline_model_parallel_size",
            expected="at least 2, with at least 2 pipeline stages",
            fix="set it to null, or raise the two",
        )


def _batch_sizes(recipe: Recipe) -> Iterator[UserError]:
    batch, rollout = recipe.policy.train_global_batch_size, recipe.rollout_batch_size
    name = "policy.train_global_batch_size"
    if rollout % batch:
        prompts, repeats = recipe.grpo.num_prompts_per_step, recipe.grpo.num_generations_per_prompt
        yield UserError(
            f"is {batch}, which does not divide the rollout batch of {prompts} prompts × {repeats} = {rollout}",
            where=name,
            fix=f"choose a divisor of {rollout}, or change grpo.num_prompts_per_step",
        )
    megatron = recipe.policy.megatron_cfg
    if recipe.world_size % recipe.model_parallel_size:
        return
    data = recipe.data_parallel_size
    if batch % data:
        yield UserError(
            f"is {batch}, which {data} data parallel ranks cannot share evenly",
            where=name,
            expected=f"a multiple of {data}",
            fix=f"set it to {_round_up(batch, data)}",
        )
    elif megatron.virtual_pipeline_model_parallel_size and batch // data < megatron.pipeline_model_parallel_size:
        stages = megatron.pipeline_model_parallel_size
        yield UserError(
            f"is {batch}: {batch // data} responses per data parallel rank",
            where=name,
            expected=f"at least {stages} each: a virtual pipeline needs a micro-batch for each of its {stages} stages",
            fix=f"set it to {stages * data} or more",
        )


def _lengths(recipe: Recipe) -> Iterator[UserError]:
    policy, generation, longest = recipe.policy, recipe.policy.generation, recipe.policy.max_total_sequence_length
    prompt, response = recipe.data.max_input_seq_length, generation.max_new_tokens
    if prompt + response > longest:
        yield UserError(
            f"is {longest}, but a prompt of {prompt} and a response of {response} tokens make {prompt + response}",
            where="policy.max_total_sequence_length",
            fix=f"raise it to {prompt + response}, or lower data.max_input_seq_length or {_GENERATION}.max_new_tokens",
        )
    context = generation.sglang_cfg.context_length
    if generation.backend == "sglang" and context is not None and context < longest:
        yield UserError(
            f"is {context}",
            where=f"{_GENERATION}.sglang_cfg.context_length",
            expected=f"at least {longest}, policy.max_total_sequence_length",
            fix="raise it, or leave it out",
        )
    if policy.sequence_packing.enabled:
        parallel = policy.megatron_cfg.context_parallel_size
        padded = longest if parallel == 1 else _round_up(longest, 2 * parallel)
        budget = policy.sequence_packing.train_mb_tokens
        if budget < padded:
            yield UserError(
                f"is {budget}, too small for one sequence of policy.max_total_sequence_length "
                f"({longest}, padded to {padded})",
                where="policy.sequence_packing.train_mb_tokens",
                expected=f"at least {padded}",
                fix="raise it, or lower policy.max_total_sequence_length",
            )


def _sampling(recipe: Recipe) -> Iterator[UserError]:
    generation = recipe.policy.generation
    if not generation.temperature > 0:
        yield UserError(
            f"is {generation.temperature}; greedy responses have no log-probs to train on",
            where=f"{_GENERATION}.temperature",
            expected="more than 0",
            fix="for greedy evaluation set policy.generation.val_temperature=0",
        )
    if not 0 < generation.top_p <= 1:
        yield UserError(f"is {generation.top_p}", where=f"{_GENERATION}.top_p", expected="in (0, 1]")
    if generation.top_k is not None and generation.top_k != -1 and generation.top_k < 1:
        yield UserError(f"is {generation.top_k}", where=f"{_GENERATION}.top_k", expected="at least 1, or null for all")
    if generation.val_temperature is not None and generation.val_temperature < 0:
        yield UserError(
            f"is {generation.val_temperature}", where=f"{_GENERATION}.val_temperature", expected="at least 0 (greedy)"
        )
    if generation.val_top_p is not None and not 0 < generation.val_top_p <= 1:
        yield UserError(f"is {generation.val_top_p}", where=f"{_GENERATION}.val_top_p", expected="in (0, 1]")


def _combinations(recipe: Recipe) -> Iterator[UserError]:
    policy, megatron = recipe.policy, recipe.policy.megatron_cfg
    generation, loss = policy.generation, recipe.loss_fn
    if not recipe.data.train.path:
        yield UserError("has no value", where="data.train.path", expected="a parquet or JSONL file in veRL's schema")
    if recipe.grpo.num_generations_per_prompt == 1 and recipe.grpo.advantage_estimator == "auto":
        yield UserError(
            "is 1: a group of one response has no advantage over its own mean, and nothing would be learned",
            where="grpo.num_generations_per_prompt",
            expected="at least 2",
            fix="raise it, or choose a grpo.advantage_estimator that needs no group",
        )
    if loss.aggregation == "token-sum-norm" and not loss.aggregation_length:
        yield UserError(
            "has no value", where="loss_fn.aggregation_length", expected="the constant length token-sum-norm divides by"
        )
    if megatron.layer_spec == "te" and recipe.cluster.device == "cpu":
        yield UserError(
            "is te on a CPU",
            where=f"{_MEGATRON}.layer_spec",
            expected="native, or auto",
            fix="Transformer Engine needs CUDA",
        )
    if megatron.layer_spec == "native":
        for name in NEED_TRANSFORMER_ENGINE:
            if getattr(megatron, name):
                yield UserError(
                    "is true with layer_spec native",
                    where=f"{_MEGATRON}.{name}",
                    fix="set it to false, or layer_spec=te",
                )
    if (
        policy.router_replay.mode == "R3"
        and generation.backend == "sglang"
        and not generation.sglang_cfg.enable_return_routed_experts
    ):
        yield UserError(
            "is false, but policy.router_replay.mode R3 replays the routes the servers return",
            where=f"{_GENERATION}.sglang_cfg.enable_return_routed_experts",
            fix="set it to true",
        )
    for url in generation.sglang_cfg.urls:
        if "@" in url:
            yield UserError(
                "holds credentials, which would be saved and logged with it",
                where=f"{_GENERATION}.sglang_cfg.urls",
                fix="give the key in $VESPO_SGLANG_API_KEY (sglang_cfg.api_key)",
            )
        elif not url.startswith(("http://", "https://")):
            yield UserError(
                f"holds {url!r}",
                where=f"{_GENERATION}.sglang_cfg.urls",
                expected="addresses such as http://127.0.0.1:30000",
            )


def _asynchronous(recipe: Recipe) -> Iterator[UserError]:
    asynchronous, generation = recipe.grpo.async_grpo, recipe.policy.generation
    if asynchronous.max_staleness is not None and asynchronous.staleness_threshold is not None:
        yield UserError(
            "is given with max_staleness, whose other name it is", where="grpo.async_grpo.staleness_threshold"
        )
    if not asynchronous.enabled:
        return
    if generation.sglang_cfg.colocated:
        yield UserError(
            "is true: servers that give their memory to the trainer cannot generate beside it",
            where=f"{_GENERATION}.sglang_cfg.colocated",
            fix="set it to false, or grpo.async_grpo.enabled=false",
        )
    if asynchronous.on_weight_update == "in_place" and generation.backend != "sglang":
        yield UserError(
            f"is in_place with backend {generation.backend}",
            where="grpo.async_grpo.on_weight_update",
            expected="abort_and_continue or drain: only SGLang changes weights under a running request",
        )
    replay = recipe.policy.router_replay
    if replay.mode == "R3" and asynchronous.on_weight_update == "in_place":
        yield UserError(
            "is in_place: SGLang's routes of a response that crosses an update are true of no weights, and R3 has none",
            where="grpo.async_grpo.on_weight_update",
            expected="abort_and_continue or drain",
        )
    elif replay.mode == "R3" and replay.on_stale_routes == "error" and asynchronous.on_weight_update != "drain":
        yield UserError(
            "is error, but responses that new weights interrupt have routes of the last weights only",
            where="policy.router_replay.on_stale_routes",
            expected="live or drop",
            fix="or set grpo.async_grpo.on_weight_update=drain",
        )
    if recipe.loss_fn.behavior == "recompute" and asynchronous.staleness > 0:
        yield UserError(
            "is recompute: π_old of the weights that sampled is gone when a stale sample is trained on",
            where="loss_fn.behavior",
            expected="rollout, or grpo.async_grpo.max_staleness=0",
        )


def _weight_sync(recipe: Recipe) -> Iterator[UserError]:
    config = recipe.policy.generation.sglang_cfg
    if config.weight_transport == "tensor":
        where, fix = f"{_GENERATION}.sglang_cfg.weight_transport", "set it to distributed or disk"
        if config.urls:
            yield UserError(
                "is tensor, which sends a server what it unpickles, but the servers of `urls` are not this run's own",
                where=where,
                fix=fix,
            )
        elif config.host not in ("127.0.0.1", "localhost", "::1"):
            yield UserError(
                f"is tensor, which sends a server what it unpickles, but the servers listen on {config.host}",
                where=where,
                expected=f"{_GENERATION}.sglang_cfg.host=127.0.0.1",
                fix=fix,
            )
    if config.colocated and config.weight_transport == "distributed" and recipe.cluster.device != "cpu":
        yield UserError(
            "is true with weight_transport distributed: NCCL takes no two processes on one GPU",
            where=f"{_GENERATION}.sglang_cfg.colocated",
            fix=f"set {_GENERATION}.sglang_cfg.weight_transport=tensor",
        )


# ---- the recipe and its model ------------------------------------------------------------------------------------


def model_problems(recipe: Recipe, config: Mapping[str, Any]) -> Iterator[UserError]:
    """What the recipe asks of its model that this model cannot do.

    Args:
        config: the model's `config.json`; keys that are not there are not checked.
    """
    megatron, folder = recipe.policy.megatron_cfg, recipe.policy.model_name
    tensor, expert, expert_tensor = (
        megatron.tensor_model_parallel_size,
        megatron.expert_model_parallel_size,
        megatron.expert_tensor_parallel_size,
    )
    experts = config.get("num_experts", config.get("num_local_experts"))
    vocab, groups = config.get("vocab_size"), config.get("num_key_value_heads")
    divisions = [
        (config.get("num_attention_heads"), "attention heads", tensor, f"TP {tensor}", "tensor_model_parallel_size"),
        (groups, "key/value heads", tensor, f"TP {tensor}", "tensor_model_parallel_size"),
        (experts, "experts", expert, f"EP {expert}", "expert_model_parallel_size"),
        (
            config.get("moe_intermediate_size"),
            "channels of an expert",
            expert_tensor,
            f"ETP {expert_tensor}",
            "expert_tensor_parallel_size",
        ),
    ]
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        size = config.get("intermediate_size")
        divisions.append((size, "channels of a dense MLP", tensor, f"TP {tensor}", "tensor_model_parallel_size"))
    for count, what, parts, split, name in divisions:
        if count is not None and count % parts:
            divisors = ", ".join(str(size) for size in range(1, min(count, 64) + 1) if count % size == 0)
            yield UserError(
                f"the {count} {what} of {folder} cannot be split into {split}",
                where=f"{_MEGATRON}.{name}",
                expected=f"a divisor of {count} ({divisors})",
            )
    if config.get("num_hidden_layers") is not None:
        yield from _layer_split(megatron, config["num_hidden_layers"], folder)
    limit, longest = config.get("max_position_embeddings"), recipe.policy.max_total_sequence_length
    if limit is not None and longest > limit:
        yield UserError(
            f"is {longest}",
            where="policy.max_total_sequence_length",
            expected=f"at most {limit}, the context of {folder}",
        )
    generation = recipe.policy.generation
    top_k = vocab if generation.top_k in (None, -1) else generation.top_k
    truncates = generation.top_p < 1 or generation.top_k not in (None, -1)
    if generation.backend == "sglang" and truncates and top_k is not None and top_k > MAX_SAMPLING_MASK_TOKENS:
        yield UserError(
            f"is {generation.top_k} with top_p {generation.top_p}; SGLang tells what a token was drawn from only where "
            f"that is at most {MAX_SAMPLING_MASK_TOKENS} tokens, and without it π cannot be taken over the same",
            where=f"{_GENERATION}.top_k",
            expected=f"1 to {MAX_SAMPLING_MASK_TOKENS} where sampling truncates",
            fix=f"set it to {MAX_SAMPLING_MASK_TOKENS} beside top_p, or top_p to 1.0 and top_k to null",
        )
    for token in generation.stop_token_ids:
        if vocab is not None and not 0 <= token < vocab:
            yield UserError(
                f"holds {token}", where=f"{_GENERATION}.stop_token_ids", expected=f"ids below {folder}'s {vocab}"
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


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
