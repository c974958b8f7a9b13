"""Impossible recipes are refused before a process starts, and the message says what to change."""

from __future__ import annotations

import pytest
from model_config import shape, write_config

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.model_rules import model_problems
from vespo_megatron.recipe.model_shape import read_shape
from vespo_megatron.recipe.rules import problems, validate
from vespo_megatron.recipe.schema import Recipe


def changed(**values) -> Recipe:
    """The default recipe on two processes with `section__key=value` changed (a double underscore for each dot)."""
    base = {"policy.model_name": "a/model", "data.train.path": "train.parquet", "cluster.gpus_per_node": 2}
    return Recipe().with_values(base | {name.replace("__", "."): value for name, value in values.items()})


M = "policy__megatron_cfg__"
TP, PP, CP = M + "tensor_model_parallel_size", M + "pipeline_model_parallel_size", M + "context_parallel_size"
EP, ETP, VPP = (
    M + "expert_model_parallel_size",
    M + "expert_tensor_parallel_size",
    M + "virtual_pipeline_model_parallel_size",
)
SP, GPUS, GLOBAL_BATCH = M + "sequence_parallel", "cluster__gpus_per_node", "policy__train_global_batch_size"
FIRST, LAST = M + "num_layers_in_first_pipeline_stage", M + "num_layers_in_last_pipeline_stage"
BIAS_RATE = M + "moe_router_bias_update_rate"
G = "policy__generation__"
DIAL = G + "mismatch__"
OFFLOAD = {M + "optimizer__optimizer_cpu_offload": True, M + "optimizer__optimizer_offload_fraction": 1.0}

IMPOSSIBLE = {
    "world not divisible by TP·PP·CP": ({GPUS: 6, TP: 2, SP: True, CP: 2}, "cluster", "multiple of 4"),
    "world not divisible by ETP·EP·PP": ({GPUS: 2, EP: 4}, "expert_model_parallel_size", "divides 2"),
    "EP·ETP beyond the world": ({GPUS: 2, EP: 2, ETP: 2}, "expert_model_parallel_size", "lower it"),
    "sequence parallel without TP": ({SP: True}, "sequence_parallel", "set it to false"),
    "a balancing loss without its coefficient": (
        {M + "moe_router_load_balancing_type": "aux_loss"},
        "moe_aux_loss_coeff",
        "set both, or neither",
    ),
    "a coefficient without its loss": ({M + "moe_aux_loss_coeff": 0.01}, "moe_aux_loss_coeff", "set both, or neither"),
    "MoE with TP without sequence parallel": ({TP: 2}, "sequence_parallel", "set it to true"),
    "VPP without PP": ({VPP: 2}, "virtual_pipeline_model_parallel_size", "set it to null"),
    "VPP of one chunk": ({PP: 2, VPP: 1}, "virtual_pipeline_model_parallel_size", "at least 2"),
    "rollout batch not divisible": ({GLOBAL_BATCH: 100}, "train_global_batch_size", "divisor of 256"),
    "mini-batch not shared evenly": ({GPUS: 3, GLOBAL_BATCH: 256}, "train_global_batch_size", "set it to 258"),
    "mini-batch larger than rollout batch": ({GLOBAL_BATCH: 512}, "train_global_batch_size", "divisor of 256"),
    "VPP with too few micro-batches": (
        {GPUS: 4, PP: 4, VPP: 2, GLOBAL_BATCH: 2},
        "train_global_batch_size",
        "set it to 4",
    ),
    "prompt and response beyond the total": (
        {G + "max_new_tokens": 800},
        "max_total_sequence_length",
        "raise it to 1312",
    ),
    "server context too short": ({G + "sglang_cfg__context_length": 512}, "context_length", "at least 1024"),
    "token budget below one sequence": (
        {"policy__sequence_packing__train_mb_tokens": 1000},
        "train_mb_tokens",
        "at least 1024",
    ),
    "token budget below one padded sequence": (
        {CP: 2, "policy__max_total_sequence_length": 1025, "policy__sequence_packing__train_mb_tokens": 1025},
        "train_mb_tokens",
        "at least 1028",
    ),
    "greedy training": ({G + "temperature": 0.0}, "temperature", "val_temperature=0"),
    "top_p out of range": ({G + "top_p": 0.0}, "top_p", "(0, 1]"),
    "top_k out of range": ({G + "top_k": 0}, "top_k", "null for all"),
    "val_top_p out of range": ({G + "val_top_p": 0.0}, "val_top_p", "(0, 1]"),
    "negative val_temperature": ({G + "val_temperature": -1.0}, "val_temperature", "at least 0"),
    "a staleness of two names": (
        {"grpo__async_grpo__max_staleness": 1.0, "grpo__async_grpo__staleness_threshold": 1.0},
        "staleness_threshold",
        "max_staleness",
    ),
    "over-sampling beside training": (
        {"grpo__oversample": 1.25, "grpo__async_grpo__enabled": True},
        "grpo.oversample",
        "max_staleness",
    ),
    "over-sampling of conversations": (
        {"grpo__oversample": 1.25, "env__class": "calculator"},
        "grpo.oversample",
        "env.class",
    ),
    "partial rollouts of which nothing is ended": ({"grpo__partial_rollouts": True}, "partial_rollouts", "oversample"),
    "partial rollouts scored by weights that nobody has": (
        {"grpo__partial_rollouts": True, "grpo__oversample": 2.0, "loss_fn__behavior": "version"},
        "partial_rollouts",
        "recompute or rollout",
    ),
    "a curriculum that nothing fits": (
        {"data__curriculum__min_solved": 0.8, "data__curriculum__max_solved": 0.2},
        "min_solved",
        "max_solved",
    ),
    "router shift without π_old": (
        {"loss_fn__router_shift__apply": "before_clip", "loss_fn__behavior": "rollout"},
        "loss_fn.router_shift.apply",
        "recompute or version",
    ),
    "a cache that SGLang alone rounds": ({DIAL + "kv_cache": "fp8_e4m3"}, "mismatch.kv_cache", "backend=in_process"),
    "inputs that SGLang alone rounds": (
        {DIAL + "activations": "float16"},
        "mismatch.activations",
        "backend=in_process",
    ),
    "routes that SGLang alone chooses": ({DIAL + "route_flip": 0.1}, "mismatch.route_flip", "backend=in_process"),
    "noise on SGLang's log-probs": ({DIAL + "log_prob_noise": 0.1}, "mismatch.log_prob_noise", "backend=in_process"),
    "groups of a format without any": (
        {DIAL + "weights": "fp8_e4m3", DIAL + "group_size": 32},
        "mismatch.group_size",
        "int8, int6, int4, int3 and int2",
    ),
    "layers of flips that do not happen": (
        {DIAL + "route_flip_layers": [0]},
        "mismatch.route_flip_layers",
        "route_flip above 0",
    ),
    "flips in no layer": (
        {DIAL + "route_flip": 0.1, DIAL + "route_flip_layers": [], G + "backend": "in_process"},
        "mismatch.route_flip_layers",
        "at least one layer",
    ),
    "weights of a pattern that is none": (
        {DIAL + "weights_pattern": "(_proj"},
        "weights_pattern",
        "regular expression",
    ),
    "weights of an unknown format": ({DIAL + "weights": "int5"}, "mismatch.weights", "one of none, bfloat16"),
    "weights rounded by two keys": (
        {"policy__quantization__scheme": "int4", DIAL + "weights": "int8"},
        "policy.quantization.scheme",
        "is int4 beside policy.generation.mismatch.weights=int8",
    ),
    "groups of a flow without any": (
        {"policy__quantization__scheme": "bfloat16", "policy__quantization__group_size": 32},
        "policy.quantization.group_size",
        "int8, int6, int4, int3 and int2",
    ),
    "a flow of an unknown format": ({"policy__quantization__scheme": "fp4"}, "quantization.scheme", "one of none"),
    "a flow of training alone": (
        {"policy__quantization__scheme": "int4", "policy__quantization__where": "training"},
        "quantization.where",
        "one of rollout, both",
    ),
    "groups of one": ({"grpo__num_generations_per_prompt": 1, GLOBAL_BATCH: 32}, "num_generations_per_prompt", "2"),
    "a pass of more than the group": ({"grpo__pass_at_k": 9}, "grpo.pass_at_k", "at most"),
    "a baseline beside an estimator": (
        {"loss_fn__off_policy_baseline": "vcpo", "grpo__advantage_estimator": "opo"},
        "off_policy_baseline",
        "advantage_estimator=auto",
    ),
    "a baseline of cut groups": (
        {"loss_fn__off_policy_baseline": "vcpo", GLOBAL_BATCH: 4, "grpo__num_generations_per_prompt": 8},
        "off_policy_baseline",
        "multiple of",
    ),
    "a baseline under replay": (
        {"loss_fn__off_policy_baseline": "vcpo", "policy__router_replay__mode": "R2"},
        "off_policy_baseline",
        "router_replay.mode=none",
    ),
    "a baseline in a virtual pipeline": (
        {"loss_fn__off_policy_baseline": "vcpo", GPUS: 4, PP: 2, VPP: 2},
        "off_policy_baseline",
        "virtual",
    ),
    "a baseline that is clipped": (
        {"loss_fn__off_policy_baseline": "vcpo", "grpo__advantage_clip_high": 1.0},
        "off_policy_baseline",
        "advantage_clip",
    ),
    "no training data": ({"data__train__path": None}, "data.train.path", "parquet"),
    "token-sum-norm without its length": ({"loss_fn__aggregation": "token-sum-norm"}, "aggregation_length", "length"),
    "Transformer Engine on a CPU": ({"cluster__device": "cpu", M + "layer_spec": "te"}, "layer_spec", "native"),
    "fusion without Transformer Engine": (
        {M + "layer_spec": "native", M + "apply_rope_fusion": True},
        "apply_rope_fusion",
        "false",
    ),
    "fusion on a CPU": (
        {"cluster__device": "cpu", M + "moe_permute_fusion": True},
        "moe_permute_fusion",
        "auto on a CPU",
    ),
    "fusion in float32": (
        {"policy__precision": "float32", M + "apply_rope_fusion": True},
        "apply_rope_fusion",
        "auto and precision float32",
    ),
    "Transformer Engine in float32": (
        {"policy__precision": "float32", M + "layer_spec": "te"},
        "layer_spec",
        "precision=bfloat16",
    ),
    "equally many tokens of all ranks": (
        {EP: 2, M + "moe_token_dispatcher_type": "allgather"},
        "moe_token_dispatcher_type",
        "set it to alltoall",
    ),
    "DeepEP on a CPU": (
        {"cluster__device": "cpu", M + "moe_token_dispatcher_type": "flex"},
        "moe_token_dispatcher_type",
        "DeepEP's kernels need CUDA",
    ),
    "parameters that nobody shards gathered": (
        {
            M + "optimizer__use_distributed_optimizer": False,
            M + "distributed_data_parallel_config__overlap_param_gather": True,
        },
        "overlap_param_gather",
        "use_distributed_optimizer to true",
    ),
    "a sharded state of SGD": (
        {M + "optimizer__optimizer": "sgd"},
        "optimizer.optimizer",
        "distributed_optimizer=false",
    ),
    "Transformer Engine's Adam on a CPU": (
        {"cluster__device": "cpu", M + "optimizer__use_precision_aware_optimizer": True},
        "use_precision_aware_optimizer",
        "needs CUDA",
    ),
    "bfloat16's Adam in float16": (
        {"policy__precision": "float16", M + "optimizer__use_precision_aware_optimizer": True},
        "use_precision_aware_optimizer",
        "set it to false",
    ),
    "a loss scale that begins below its least": (
        {M + "optimizer__initial_loss_scale": 0.5},
        "min_loss_scale",
        "at most initial_loss_scale",
    ),
    "whole responses' gradients in float16": (
        {"policy__precision": "float16", "loss_fn__off_policy_baseline": "vcpo"},
        "off_policy_baseline",
        "bfloat16 or float32",
    ),
    "a state of lower precision that nobody shards": (
        {M + "optimizer__use_precision_aware_optimizer": True, M + "optimizer__use_distributed_optimizer": False},
        "use_precision_aware_optimizer",
        "use_distributed_optimizer to true",
    ),
    "a state that nobody shards on the host": (
        OFFLOAD | {M + "optimizer__use_distributed_optimizer": False},
        "optimizer_cpu_offload",
        "use_distributed_optimizer to true",
    ),
    "float32 weights on the host": (OFFLOAD | {"policy__precision": "float32"}, "optimizer_cpu_offload", "bfloat16"),
    "none of the state on the host": (
        {M + "optimizer__optimizer_cpu_offload": True},
        "optimizer_offload_fraction",
        "more than 0",
    ),
    "R3 without routes": ({"policy__router_replay__mode": "R3"}, "enable_return_routed_experts", "true"),
    "a server address without scheme": ({G + "sglang_cfg__urls": ["localhost:1"]}, "urls", "http://"),
    "no processes": ({GPUS: 0}, "cluster.gpus_per_node", "at least 1"),
    "a parallel size of zero": ({CP: 0}, "context_parallel_size", "at least 1"),
    "no deadline": ({"env__timeout": 0.0}, "env.timeout", "more than 0"),
    "a learning rate that is no number": ({M + "optimizer__lr": float("nan")}, "optimizer.lr", "more than 0"),
    "weights by a pickle to a server of somebody else's": (
        {G + "sglang_cfg__weight_transport": "tensor", G + "sglang_cfg__urls": ["http://10.0.0.1:30000"]},
        "weight_transport",
        "set it to distributed or disk",
    ),
    "ranks that would not wait for a weight update": (
        {G + "sglang_cfg__weight_update_timeout": 900.0},
        "weight_update_timeout",
        "less than policy.megatron_cfg.distributed_timeout",
    ),
    "weights by a pickle to a server that others reach": (
        {G + "sglang_cfg__weight_transport": "tensor", G + "sglang_cfg__host": "0.0.0.0"},
        "weight_transport",
        "host=127.0.0.1",
    ),
    "two processes of one NCCL group on one GPU": (
        {G + "sglang_cfg__colocated": True, "cluster__device": "cuda"},
        "sglang_cfg.colocated",
        "weight_transport=tensor",
    ),
    "a port below 0": ({G + "sglang_cfg__port": -5}, "sglang_cfg.port", "[0, 65535]"),
    "ports beyond the last": (
        {G + "sglang_cfg__port": 65530, G + "sglang_cfg__num_servers": 8},
        "port",
        "at most 65528",
    ),
    "a decay of 7": ({M + "optimizer__adam_beta1": 7.0}, "optimizer.adam_beta1", "[0, 1)"),
    "a negative epsilon": ({M + "optimizer__adam_eps": -1.0}, "optimizer.adam_eps", "more than 0"),
    "less than nothing offloaded": (
        {M + "optimizer__optimizer_offload_fraction": -3.0},
        "optimizer_offload_fraction",
        "[0, 1]",
    ),
    "nine times the memory": ({G + "sglang_cfg__mem_fraction_static": 9.0}, "mem_fraction_static", "(0, 1)"),
    "a misspelt choice": ({"policy__precision": "bf16"}, "policy.precision", "bfloat16"),
}


def faults(values) -> list[UserError]:
    """What the schema or, where it takes the values, the rules say."""
    try:
        return list(problems(changed(**values)))
    except UserError as error:
        return [error]


def test_the_default_recipe_has_no_problem():
    assert list(problems(changed())) == []


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_an_impossible_recipe_is_refused_by_one_message_that_says_what_to_change(name):
    values, where, advice = IMPOSSIBLE[name]
    found = faults(values)
    assert [where in problem.where for problem in found] == [True], [str(problem) for problem in found]
    assert advice in str(found[0])


@pytest.mark.parametrize(
    "values",
    [
        {TP: 2, SP: True, EP: 2},
        {PP: 2},
        {GPUS: 4, PP: 2, VPP: 2},
        {GPUS: 8, TP: 2, SP: True, PP: 2, CP: 2, EP: 2},
        {GPUS: 4, EP: 4},
        {EP: 2, GLOBAL_BATCH: 64},
        {M + "moe_token_dispatcher_type": "allgather"},
        OFFLOAD | {"cluster__device": "cpu"},
        {M + "optimizer__optimizer": "sgd", M + "optimizer__use_distributed_optimizer": False},
        {G + "top_k": -1, G + "val_temperature": 0.0},
        {G + "top_p": 0.9, G + "top_k": 20},
        {"policy__sequence_packing__enabled": False, "policy__sequence_packing__train_mb_tokens": 1},
        {"grpo__num_generations_per_prompt": 1, GLOBAL_BATCH: 32, "grpo__advantage_estimator": "batch_mean"},
    ],
)
def test_a_possible_recipe_is_let_through(values):
    assert [str(problem) for problem in problems(changed(**values))] == []


@pytest.mark.parametrize(
    ("values", "config", "where", "advice"),
    [
        ({TP: 8}, {}, "tensor_model_parallel_size", "4 attention heads"),
        ({TP: 4}, {}, "tensor_model_parallel_size", "2 key/value heads"),
        ({PP: 3}, {}, "pipeline_model_parallel_size", "divisor of 4 (1, 2, 4)"),
        ({PP: 2, VPP: 4}, {}, "virtual_pipeline_model_parallel_size", "2 layers of a stage cannot be split into VPP 4"),
        ({PP: 2}, {"num_hidden_layers": 3}, "pipeline_model_parallel_size", "num_layers_in_first_pipeline_stage"),
        ({PP: 2, FIRST: 4}, {}, "pipeline_model_parallel_size", "with 4 in the outer stages"),
        ({PP: 2, FIRST: 1, LAST: 2}, {}, "pipeline_model_parallel_size", "with 1 and 2 in the outer stages"),
        ({FIRST: 1}, {}, "pipeline_model_parallel_size", "leave them out"),
        ({EP: 3}, {}, "expert_model_parallel_size", "8 experts"),
        (
            {"loss_fn__router_shift__apply": "after_clip"},
            {"mlp_only_layers": [0, 1, 2, 3]},
            "loss_fn.router_shift.apply",
            "has no routers",
        ),
        ({EP: 2}, {"mlp_only_layers": [0, 1, 2, 3]}, "expert_model_parallel_size", "has no routers"),
        ({"policy__router_replay__mode": "R3"}, {"num_experts": 0}, "policy.router_replay.mode", "has no routers"),
        (
            {G + "sglang_cfg__enable_return_routed_experts": True},
            {"num_experts": 0},
            "sglang_cfg.enable_return_routed_experts",
            "expected: false, or a model with routers",
        ),
        ({BIAS_RATE: 0.001}, {}, "moe_router_bias_update_rate", "have no correction bias"),
        ({ETP: 3}, {}, "expert_tensor_parallel_size", "64 channels of an expert"),
        ({TP: 2}, {"mlp_only_layers": [0], "intermediate_size": 129}, "tensor_model_parallel_size", "129 channels"),
        ({"policy__max_total_sequence_length": 4096}, {}, "max_total_sequence_length", "at most 2048"),
        ({G + "stop_token_ids": [128]}, {}, "stop_token_ids", "ids below"),
        ({G + "top_p": 0.9}, {"vocab_size": 151936}, "generation.top_k", "set it to 4096 beside top_p"),
        ({G + "min_p": 0.01}, {"vocab_size": 151936}, "generation.top_k", "min_p to 0"),
        ({G + "top_k": 5000}, {"vocab_size": 151936}, "generation.top_k", "1 to 4096"),
        ({DIAL + "route_flip": 0.1}, {"num_experts_per_tok": 8}, "mismatch.route_flip", "no next-best expert"),
        (
            {DIAL + "route_flip": 0.1, DIAL + "route_flip_layers": [1, 0]},
            {"mlp_only_layers": [0]},
            "mismatch.route_flip_layers",
            "holds 0",
        ),
    ],
)
def test_a_layout_the_model_cannot_take_is_refused(values, config, where, advice):
    found = [str(problem) for problem in model_problems(changed(**values), shape(**config))]
    assert any(where in problem and advice in problem for problem in found), found


def test_a_layout_the_model_can_take_is_let_through():
    values = {GPUS: 4, TP: 2, SP: True, PP: 2, EP: 2, ETP: 1, VPP: 2}
    assert list(model_problems(changed(**values), shape())) == []


@pytest.mark.parametrize("more", [{G + "top_k": 4096}, {G + "backend": "in_process"}])
def test_truncated_sampling_is_let_through_where_the_engine_tells_what_it_drew_from(more):
    values = {G + "top_p": 0.9} | more
    assert list(model_problems(changed(**values), shape(vocab_size=151936))) == []
    assert list(model_problems(changed(**{G + "top_p": 0.9}), shape())) == [], "a small vocabulary is its own top-k"


@pytest.mark.parametrize("values", [{FIRST: 1}, {LAST: 2}, {FIRST: 1, LAST: 2}])
def test_stages_of_unequal_size_are_let_through_when_they_are_given(values):
    assert list(model_problems(changed(**values, **{GPUS: 2, PP: 2}), shape(num_hidden_layers=3))) == []


def test_validate_tells_all_problems_at_once(tmp_path):
    with pytest.raises(UserError, match="2 problems") as error:
        validate(changed(**{TP: 2, G + "max_new_tokens": 800}))
    assert "sequence_parallel" in str(error.value) and "max_total_sequence_length" in str(error.value)
    with pytest.raises(UserError, match="2 problems") as error:
        changed(**{GPUS: 0, G + "temperature": 0.0})
    assert "gpus_per_node" in str(error.value) and "temperature" in str(error.value)


def test_validate_reads_the_model_config(tmp_path):
    write_config(tmp_path)
    validate(changed(policy__model_name=str(tmp_path)))
    with pytest.raises(UserError, match="8 experts"):
        validate(
            changed(
                **{
                    "policy__model_name": str(tmp_path),
                    GPUS: 3,
                    EP: 3,
                    GLOBAL_BATCH: 192,
                    "grpo__num_prompts_per_step": 24,
                }
            )
        )


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_model_folder_without_a_readable_config_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json"):
        read_shape(tmp_path)
