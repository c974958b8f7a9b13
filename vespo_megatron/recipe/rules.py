"""Rules between recipe keys: what they may not ask for together, found before any process starts.

What one key may hold is beside it in the schema; what the model's `config.json` allows is in `model_rules`; names that
tables own (objectives, estimators, rewards) are checked there. Imports neither torch, megatron-core nor transformers.
"""

from __future__ import annotations

from collections.abc import Iterator

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.model_rules import model_problems
from vespo_megatron.recipe.model_shape import read_shape
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.recipe.schema.problems import all_of

_MEGATRON, _GENERATION = "policy.megatron_cfg", "policy.generation"

LAST_PORT = 65535
TURN_ESTIMATORS = (
    *("auto", "group_mean", "group_mean_std", "leave_one_out", "leave_one_out_std", "leave_one_out_group_std"),
    "dr_grpo",
)
"""Advantage estimators that rewards of single turns are given to."""
NEED_TRANSFORMER_ENGINE = ("moe_permute_fusion", "apply_rope_fusion")


def validate(recipe: Recipe) -> None:
    """Raise `UserError` with everything that is wrong with the recipe and with what it asks of its model."""
    found = list(problems(recipe))
    if not found:
        found = list(model_problems(recipe, read_shape(recipe.policy.model_name)))
    if found:
        raise all_of(found)


def problems(recipe: Recipe) -> Iterator[UserError]:
    """What is wrong with a recipe as a whole, whatever its model; each value alone is held by the schema."""
    yield from _parallel_layout(recipe)
    yield from _batch_sizes(recipe)
    yield from _lengths(recipe)
    yield from _training(recipe)
    yield from _environment(recipe)
    yield from _off_policy_baseline(recipe)
    yield from _router_shift(recipe)
    yield from _layers(recipe)
    yield from _dispatcher(recipe)
    yield from _optimizer(recipe)
    yield from _router_losses(recipe)
    yield from _routing_replay(recipe)
    yield from _asynchronous(recipe)
    yield from _oversampling(recipe)
    yield from _mismatch(recipe)
    yield from _quantization(recipe)
    if recipe.policy.generation.backend == "sglang":
        yield from _servers(recipe)
        yield from _weight_sync(recipe)


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


def _training(recipe: Recipe) -> Iterator[UserError]:
    loss = recipe.loss_fn
    yield from _sets(recipe)
    if recipe.grpo.num_generations_per_prompt == 1 and recipe.grpo.advantage_estimator == "auto":
        yield UserError(
            "is 1: a group of one response has no advantage over its own mean, and nothing would be learned",
            where="grpo.num_generations_per_prompt",
            expected="at least 2",
            fix="raise it, or choose a grpo.advantage_estimator that needs no group",
        )
    if recipe.grpo.pass_at_k > recipe.grpo.num_generations_per_prompt:
        yield UserError(
            f"is {recipe.grpo.pass_at_k}, of groups of {recipe.grpo.num_generations_per_prompt} responses",
            where="grpo.pass_at_k",
            expected="at most grpo.num_generations_per_prompt",
        )
    if loss.aggregation == "token-sum-norm" and not loss.aggregation_length:
        yield UserError(
            "has no value", where="loss_fn.aggregation_length", expected="the constant length token-sum-norm divides by"
        )


def _sets(recipe: Recipe) -> Iterator[UserError]:
    train = recipe.data.train
    if not train.given:
        yield UserError("has no value", where="data.train.path", expected="a parquet or JSONL file in veRL's schema")
    for split, config in (("train", train), ("validation", recipe.data.validation)):
        where = f"data.{split}"
        if config.sets and config.path:
            yield UserError("is there beside data." + split + ".sets", where=f"{where}.path", fix="keep one of them")
        for name, each in config.sets.items():
            if not each.path:
                yield UserError("has no value", where=f"{where}.sets.{name}.path", expected="where the set is")
            if not name or "/" in name:
                yield UserError(f"has a set {name!r}", where=f"{where}.sets", expected="names without /")
            if split == "validation" and each.weight is not None:
                yield UserError("is for training", where=f"{where}.sets.{name}.weight", fix="leave it out")
            if split == "train" and (each.num_samples, each.temperature, each.top_p) != (None, None, None):
                yield UserError(
                    "has num_samples, temperature or top_p, which are for validation", where=f"{where}.sets.{name}"
                )
    if recipe.data.validation.streaming:
        yield UserError("is for training", where="data.validation.streaming", fix="leave it out")
    if train.streaming and any(each.max_samples for each in train.given.values()):
        yield UserError(
            "has no end to draw from: max_samples is given", where="data.train.streaming", fix="leave one out"
        )
    if recipe.env.reward_by_source and recipe.env.rewards:
        yield UserError("is there beside env.rewards", where="env.reward_by_source", fix="keep one of them")


def _environment(recipe: Recipe) -> Iterator[UserError]:
    env, schedule = recipe.env, recipe.grpo
    if env.environment is None:
        for name, given in (("options", bool(env.options)), ("max_tokens_per_turn", env.max_tokens_per_turn)):
            if given:
                yield UserError(
                    "is for an environment", where=f"env.{name}", fix="name one in env.class, or leave it out"
                )
        if schedule.advantage_level == "turn":
            yield UserError(
                "is turn, and responses have one turn: nothing answers",
                where="grpo.advantage_level",
                fix="name an environment in env.class, or set it to response",
            )
        return
    if schedule.advantage_level == "response":
        return
    where = "grpo.advantage_level"
    if schedule.advantage_estimator not in TURN_ESTIMATORS:
        yield UserError(
            f"is turn with the estimator {schedule.advantage_estimator}",
            where=where,
            expected=f"one that needs rewards and groups alone: {', '.join(TURN_ESTIMATORS)}",
        )
    if recipe.loss_fn.off_policy_baseline != "none":
        yield UserError(
            "is turn, and loss_fn.off_policy_baseline makes one advantage of a response", where=where, fix="keep one"
        )
    if schedule.advantage_clip_low is not None or schedule.advantage_clip_high is not None:
        yield UserError("is not clipped", where=where, expected="no grpo.advantage_clip_low or advantage_clip_high")


def _off_policy_baseline(recipe: Recipe) -> Iterator[UserError]:
    if recipe.loss_fn.off_policy_baseline == "none":
        return
    where, schedule, policy = "loss_fn.off_policy_baseline", recipe.grpo, recipe.policy
    if schedule.advantage_estimator != "auto" or schedule.use_leave_one_out_baseline:
        yield UserError(
            "makes the advantages that another estimator would make too",
            where=where,
            expected="grpo.advantage_estimator=auto and grpo.use_leave_one_out_baseline=false",
        )
    if policy.train_global_batch_size % schedule.num_generations_per_prompt:
        yield UserError(
            f"is over groups of {schedule.num_generations_per_prompt} responses, which mini-batches of "
            f"{policy.train_global_batch_size} would cut",
            where=where,
            fix="make policy.train_global_batch_size a multiple of grpo.num_generations_per_prompt",
        )
    if policy.router_replay.mode != "none":
        yield UserError(
            "takes its gradient norms with live routers",
            where=where,
            expected="policy.router_replay.mode=none",
        )
    if policy.precision == "float16":
        yield UserError(
            "takes gradients of whole responses one by one, which a loss scale of means over a mini-batch overflows",
            where=where,
            expected="policy.precision=bfloat16 or float32",
        )
    if policy.megatron_cfg.virtual_pipeline_model_parallel_size:
        yield UserError(
            "runs responses one by one, and a virtual pipeline wants a micro-batch per stage",
            where=where,
            expected="no virtual_pipeline_model_parallel_size",
        )
    if schedule.advantage_clip_low is not None or schedule.advantage_clip_high is not None:
        yield UserError("is not clipped", where=where, expected="no grpo.advantage_clip_low or advantage_clip_high")


def _router_shift(recipe: Recipe) -> Iterator[UserError]:
    if recipe.loss_fn.router_shift.apply != "none" and recipe.behavior == "rollout":
        yield UserError(
            "compares the routers with those of π_old, which the trainer does not compute with behavior: rollout",
            where="loss_fn.router_shift.apply",
            expected="loss_fn.behavior=recompute or version",
        )


def _layers(recipe: Recipe) -> Iterator[UserError]:
    megatron = recipe.policy.megatron_cfg
    if megatron.layer_spec == "te" and recipe.cluster.device == "cpu":
        yield UserError(
            "is te on a CPU",
            where=f"{_MEGATRON}.layer_spec",
            expected="native, or auto",
            fix="Transformer Engine needs CUDA",
        )
    elif megatron.layer_spec == "te" and recipe.policy.precision == "float32":
        yield UserError(
            "is te with policy.precision float32",
            where=f"{_MEGATRON}.layer_spec",
            expected="native, or precision=bfloat16 or float16",
            fix="its attention to packed sequences runs in 16 bits alone",
        )
    reason = "layer_spec native"
    if megatron.layer_spec == "auto" and recipe.cluster.device == "cpu":
        reason = "layer_spec auto on a CPU, which is native"
    elif megatron.layer_spec == "auto" and recipe.policy.precision == "float32":
        reason = "layer_spec auto and precision float32, which is native"
    elif megatron.layer_spec != "native":
        reason = ""
    if reason:
        for name in NEED_TRANSFORMER_ENGINE:
            if getattr(megatron, name):
                yield UserError(
                    f"is true with {reason}",
                    where=f"{_MEGATRON}.{name}",
                    fix="set it to false, or layer_spec=te",
                )


def _dispatcher(recipe: Recipe) -> Iterator[UserError]:
    megatron, where = recipe.policy.megatron_cfg, f"{_MEGATRON}.moe_token_dispatcher_type"
    ranks = megatron.expert_model_parallel_size * megatron.expert_tensor_parallel_size
    if megatron.moe_token_dispatcher_type == "allgather" and ranks > 1:
        yield UserError(
            f"is allgather, for which the {ranks} ranks of EP × ETP would need equally many tokens; packs differ",
            where=where,
            expected="alltoall, or EP 1 with ETP 1",
            fix="set it to alltoall",
        )
    elif megatron.moe_token_dispatcher_type == "flex" and recipe.cluster.device == "cpu":
        yield UserError(
            "is flex on a CPU", where=where, expected="alltoall: DeepEP's kernels need CUDA", fix="set it to alltoall"
        )


def _optimizer(recipe: Recipe) -> Iterator[UserError]:
    megatron = recipe.policy.megatron_cfg
    optimizer, where = megatron.optimizer, f"{_MEGATRON}.optimizer"
    sharded = optimizer.use_distributed_optimizer
    if megatron.distributed_data_parallel_config.overlap_param_gather and not sharded:
        yield UserError(
            "is true with optimizer.use_distributed_optimizer false, which leaves nothing to gather",
            where=f"{_MEGATRON}.distributed_data_parallel_config.overlap_param_gather",
            fix="set it to false, or optimizer.use_distributed_optimizer to true",
        )
    if optimizer.optimizer == "sgd" and sharded:
        yield UserError(
            "is sgd with use_distributed_optimizer, which shards Adam's state alone",
            where=f"{where}.optimizer",
            expected="adam, or use_distributed_optimizer=false",
        )
    if optimizer.use_precision_aware_optimizer and recipe.cluster.device == "cpu":
        yield UserError(
            "is true on a CPU",
            where=f"{where}.use_precision_aware_optimizer",
            expected="false: Transformer Engine's Adam needs CUDA",
        )
    if optimizer.use_precision_aware_optimizer and recipe.policy.precision == "float16":
        yield UserError(
            "is true with policy.precision float16: it keeps float32 weights as what bfloat16 ones lack of them",
            where=f"{where}.use_precision_aware_optimizer",
            fix="set it to false",
        )
    if optimizer.min_loss_scale > optimizer.initial_loss_scale:
        yield UserError(
            f"is {optimizer.min_loss_scale:g} with initial_loss_scale {optimizer.initial_loss_scale:g}",
            where=f"{where}.min_loss_scale",
            expected="at most initial_loss_scale",
        )
    for name in ("use_precision_aware_optimizer", "optimizer_cpu_offload"):
        if getattr(optimizer, name) and not sharded:
            yield UserError(
                "is true with use_distributed_optimizer false",
                where=f"{where}.{name}",
                fix="set it to false, or use_distributed_optimizer to true",
            )
    if optimizer.optimizer_cpu_offload and recipe.policy.precision != "bfloat16":
        yield UserError(
            f"is true with policy.precision {recipe.policy.precision}",
            where=f"{where}.optimizer_cpu_offload",
            expected="precision=bfloat16: its float32 weights go to the host beside Adam's moments",
            fix="set it to false",
        )
    if optimizer.optimizer_cpu_offload and not optimizer.optimizer_offload_fraction:
        yield UserError(
            "is 0 with optimizer_cpu_offload: nothing would go to the host",
            where=f"{where}.optimizer_offload_fraction",
            expected="more than 0, up to 1",
        )


def _router_losses(recipe: Recipe) -> Iterator[UserError]:
    megatron = recipe.policy.megatron_cfg
    kind, coefficient = megatron.moe_router_load_balancing_type, megatron.moe_aux_loss_coeff
    if (kind == "none") != (coefficient == 0):
        yield UserError(
            f"is {coefficient} with moe_router_load_balancing_type {kind}",
            where=f"{_MEGATRON}.moe_aux_loss_coeff",
            expected="0 without a load balancing loss, more than 0 with one",
            fix="set both, or neither",
        )


def _routing_replay(recipe: Recipe) -> Iterator[UserError]:
    policy, generation = recipe.policy, recipe.policy.generation
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


def _servers(recipe: Recipe) -> Iterator[UserError]:
    config = recipe.policy.generation.sglang_cfg
    last = config.port + config.num_servers - 1
    if config.port and not config.urls and last > LAST_PORT:
        yield UserError(
            f"is {config.port}: {config.num_servers} servers would listen on ports up to {last}",
            where=f"{_GENERATION}.sglang_cfg.port",
            expected=f"at most {LAST_PORT - config.num_servers + 1}, or 0 for free ports",
        )
    for url in config.urls:
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


def _oversampling(recipe: Recipe) -> Iterator[UserError]:
    schedule = recipe.grpo
    if schedule.oversample > 1 and schedule.async_grpo.enabled:
        yield UserError(
            f"is {schedule.oversample:g} in an asynchronous run, which draws ahead as far as its staleness allows",
            where="grpo.oversample",
            expected="1",
            fix="raise grpo.async_grpo.max_staleness instead",
        )
    if schedule.oversample > 1 and recipe.env.environment is not None:
        yield UserError(
            "begins responses of one turn, and env.class answers between turns",
            where="grpo.oversample",
            fix="set it to 1, or leave the environment out",
        )
    if schedule.partial_rollouts and schedule.oversample == 1:
        yield UserError(
            "is true with grpo.oversample 1, which ends nothing",
            where="grpo.partial_rollouts",
            fix="raise grpo.oversample; in an asynchronous run set grpo.async_grpo.on_weight_update=abort_and_continue",
        )
    if schedule.partial_rollouts and recipe.behavior == "version":
        yield UserError(
            "is true with behavior: version, for which a synchronous run holds no earlier weights",
            where="grpo.partial_rollouts",
            expected="loss_fn.behavior=recompute or rollout",
        )
    curriculum = recipe.data.curriculum
    if curriculum.min_solved > curriculum.max_solved:
        yield UserError(
            f"is {curriculum.min_solved:g}",
            where="data.curriculum.min_solved",
            expected=f"at most max_solved, {curriculum.max_solved:g}",
        )


def _mismatch(recipe: Recipe) -> Iterator[UserError]:
    mismatch, backend = recipe.policy.generation.mismatch, recipe.policy.generation.backend
    where = f"{_GENERATION}.mismatch"
    if mismatch.group_size is not None and not mismatch.weights.startswith("int"):
        yield UserError(
            f"is {mismatch.group_size} with weights {mismatch.weights}",
            where=f"{where}.group_size",
            expected="null: int8, int6, int4, int3 and int2 alone have groups of a size that one chooses",
        )
    if mismatch.route_flip_layers is not None and not (mismatch.route_flip_layers and mismatch.route_flip):
        yield UserError(
            f"is {mismatch.route_flip_layers} with route_flip {mismatch.route_flip:g}",
            where=f"{where}.route_flip_layers",
            expected="at least one layer, with a route_flip above 0; or null",
        )
    if backend == "sglang":
        for name, value in mismatch.in_engine.items():
            yield UserError(
                f"is {value} with backend sglang, whose servers compute as SGLang does",
                where=f"{where}.{name}",
                fix=f"set {_GENERATION}.backend=in_process, or leave it out",
            )


def _quantization(recipe: Recipe) -> Iterator[UserError]:
    flow, dial = recipe.policy.quantization, recipe.policy.generation.mismatch.weights
    where, other = "policy.quantization", f"{_GENERATION}.mismatch.weights"
    if flow.scheme != "none" and dial != "none":
        yield UserError(
            f"is {flow.scheme} beside {other}={dial}: both round the weights that go to the engine",
            where=f"{where}.scheme",
            expected="one of the two",
            fix=f"leave out {other}; {where}.where=rollout does the same",
        )
    if flow.group_size is not None and not flow.scheme.startswith("int"):
        yield UserError(
            f"is {flow.group_size} with scheme {flow.scheme}",
            where=f"{where}.group_size",
            expected="null: int8, int6, int4, int3 and int2 alone have groups of a size that one chooses",
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
    if config.weight_update_timeout >= recipe.policy.megatron_cfg.distributed_timeout:
        yield UserError(
            f"is {config.weight_update_timeout:g}: while rank 0 waits for servers so long, the others wait for it, and "
            f"their collectives end after {recipe.policy.megatron_cfg.distributed_timeout:g} s",
            where=f"{_GENERATION}.sglang_cfg.weight_update_timeout",
            expected="less than policy.megatron_cfg.distributed_timeout",
        )
    if config.colocated and config.weight_transport == "distributed" and recipe.cluster.device != "cpu":
        yield UserError(
            "is true with weight_transport distributed: NCCL takes no two processes on one GPU",
            where=f"{_GENERATION}.sglang_cfg.colocated",
            fix=f"set {_GENERATION}.sglang_cfg.weight_transport=tensor",
        )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
