"""The command line of one SGLang server, from a recipe: pure, so that it is tested without a server."""

from __future__ import annotations

from typing import Any

from vespo_megatron.errors import UserError
from vespo_megatron.families.family import family_of
from vespo_megatron.families.shape import ModelShape
from vespo_megatron.recipe.schema import Recipe, SGLangConfig
from vespo_megatron.rollout_sglang.server.environment import Environment

_CPU_KV_BYTES = 512 * 2**20
"""KV cache of a CPU server when the recipe does not say: SGLang would take most of the machine's memory."""

_CONTEXT_MARGIN = 8
"""SGLang 0.5.23 refuses a prompt within 6 tokens of its context; the client holds to the real length."""

_FIRST_GPU = "base-gpu-id"

_OWNED = {
    "model-path": "policy.model_name",
    "model": "policy.model_name",
    "host": "policy.generation.sglang_cfg.host",
    "port": "policy.generation.sglang_cfg.port",
    "device": "cluster.device",
    "dtype": "policy.generation.sglang_cfg.dtype",
    "tp-size": "policy.generation.sglang_cfg.tensor_parallel_size",
    "tp": "policy.generation.sglang_cfg.tensor_parallel_size",
    "tensor-parallel-size": "policy.generation.sglang_cfg.tensor_parallel_size",
    "context-length": "policy.generation.sglang_cfg.context_length",
    "mem-fraction-static": "policy.generation.sglang_cfg.mem_fraction_static",
    "max-total-tokens": "policy.generation.sglang_cfg.max_total_tokens",
    "enable-memory-saver": "policy.generation.sglang_cfg.colocated",
    "enable-return-routed-experts": "policy.generation.sglang_cfg.enable_return_routed_experts",
    "random-seed": "grpo.seed",
    "api-key": "policy.generation.sglang_cfg.api_key",
}
_REFUSED = {
    "admin-api-key": "weight updates would need a second key; sglang_cfg.api_key guards every endpoint",
    "config": "flags that nobody checks could come from it; put them into server_args",
    "quantization": "weights could neither be synchronised by name nor checked, and μ would be another model's",
    "kv-cache-dtype": "a quantised KV cache makes the engine's log-probs another model's",
    "weight-version": "the trainer stamps versions; a server that was started anew must not seem to have one",
    "preferred-sampling-params": "it changes sampling behind the recipe's back",
    "enable-eplb": "routes would name physical copies of experts, which the trainer has not",
    "ep-num-redundant-experts": "routes would name physical copies of experts, which the trainer has not",
    "dp-size": "SGLang 0.5.23 refuses weight updates with data-parallel replicas; raise sglang_cfg.num_servers",
    "data-parallel-size": "SGLang 0.5.23 refuses weight updates with data-parallel replicas; raise num_servers",
    "enable-dp-attention": "SGLang 0.5.23 refuses weight updates with data-parallel replicas; raise num_servers",
    "pp-size": "ranks of the weight-update group are counted by tensor parallel rank alone",
    "pipeline-parallel-size": "ranks of the weight-update group are counted by tensor parallel rank alone",
    "nnodes": "a server of several nodes is not launched from here: start it yourself and give its URL",
    "lora-paths": "weight updates do not reach adapters",
    "enable-lora": "weight updates do not reach adapters",
    "enable-custom-logit-processor": "it would change the distribution that μ is reported for",
    "weight-cache-mode": "a shared weight cache cannot be updated in place",
    "tokenizer-worker-num": "SGLang 0.5.23 then asks for no key, and finds the port in use that is held for it",
    "enable-http2": "it finds the port in use that is held for it",
    "grpc-port": "a second server would listen, on a port that nobody holds",
}


def check_server_args(server_args: dict[str, Any]) -> None:
    """Refuse, with the reason, flags that the recipe owns or that break RL."""
    for name in server_args:
        flag = _flag(name)
        where = f"policy.generation.sglang_cfg.server_args.{name}"
        if flag in _OWNED:
            raise UserError("is decided by another key", where=where, fix=f"set {_OWNED[flag]}")
        if flag.startswith("speculative-"):
            raise UserError("is refused: the draft model would keep its old weights", where=where, fix="remove it")
        if flag in _REFUSED:
            raise UserError(f"is refused: {_REFUSED[flag]}", where=where, fix="remove it")


def build_flags(
    recipe: Recipe, shape: ModelShape, environment: Environment, *, host: str, port: int, index: int
) -> list[str]:
    """Arguments after `python -m sglang.launch_server` for server number `index` on this node.

    Args:
        host: the address, in figures, that it listens on.

    Raises `UserError` for a flag that is refused or a context that the model does not have.
    """
    config = recipe.policy.generation.sglang_cfg
    check_server_args(config.server_args)
    context = context_length(recipe, shape)
    dtype = recipe.policy.precision if config.dtype == "auto" else config.dtype
    flags: dict[str, Any] = {
        "model-path": recipe.policy.model_name,
        "host": host,
        "port": port,
        "device": environment.device,
        "dtype": dtype,
        "tensor-parallel-size": config.tensor_parallel_size,
        "context-length": context + _CONTEXT_MARGIN,
        "skip-tokenizer-init": True,  # token ids in, token ids out: nothing is ever tokenised twice
        "random-seed": recipe.grpo.seed + config.first_server + index,
        "mem-fraction-static": config.mem_fraction_static,
        "max-total-tokens": config.max_total_tokens,
        "enable-return-routed-experts": config.enable_return_routed_experts,
        "log-level-http": "warning",
        "skip-server-warmup": True,
    }
    if environment.device == "cpu":
        flags |= {
            "attention-backend": "torch_native",
            "sampling-backend": "pytorch",
            "grammar-backend": "none",
            "disable-overlap-schedule": True,
            "sleep-on-idle": True,  # its scheduler otherwise spins on a core that the trainer needs
            "max-total-tokens": config.max_total_tokens or _cpu_kv_tokens(shape, dtype, context),
        }
    else:
        flags["enable-memory-saver"] = config.colocated  # needs CUDA: without, the endpoints answer and free nothing
    flags |= {_flag(name): value for name, value in config.server_args.items()}
    if (first := first_gpu(config, index)) is not None:
        flags[_FIRST_GPU] = first
    return _command_line(flags)


def first_gpu(config: SGLangConfig, index: int) -> int | None:
    """`server_args.base-gpu-id` of one server: a number is the first server's, a list has one for each.

    None where the recipe leaves it to `run.devices`. Raises UserError for a list that is too short.
    """
    given = next((value for name, value in config.server_args.items() if _flag(name) == _FIRST_GPU), None)
    if not isinstance(given, (list, tuple)):
        return None if given is None else given + index * config.tensor_parallel_size
    if len(given) < config.num_servers:
        raise UserError(
            f"has {len(given)} entries",
            where=f"policy.generation.sglang_cfg.server_args.{_FIRST_GPU}",
            expected=f"a number, or one for each of {config.num_servers} servers",
        )
    return given[index]


def context_length(recipe: Recipe, shape: ModelShape) -> int:
    """Prompt and response tokens of one request at most."""
    length = recipe.policy.generation.sglang_cfg.context_length or recipe.policy.max_total_sequence_length
    if length > shape.max_position_embeddings:
        raise UserError(
            f"a context of {length} tokens",
            where="policy.max_total_sequence_length",
            expected=f"at most the model's max_position_embeddings, {shape.max_position_embeddings}",
            fix="lower it, or use a model made for it",
        )
    return length


def check_served(shape: ModelShape, where: str) -> None:
    """Raise `UserError` for a model that SGLang 0.5.23 would not serve, or would with other layers than it has."""
    family = family_of(shape.model_type)
    if family is not None and (reason := family.not_served(shape)):
        raise UserError(
            reason,
            where=where,
            expected="a model that SGLang 0.5.23 serves as it is",
            fix="set policy.generation.backend=in_process, or use another model",
        )


def lacks_its_head(shape: ModelShape) -> bool:
    """Whether SGLang 0.5.23 gives such a model an output layer and finds nothing for it in its checkpoint."""
    family = family_of(shape.model_type)
    return shape.tie_word_embeddings and not (family is not None and family.ties_head_when_served)


def _flag(name: str) -> str:
    return name.lstrip("-").replace("_", "-")


def _cpu_kv_tokens(shape: ModelShape, dtype: str, context: int) -> int:
    tokens = _CPU_KV_BYTES // (shape.kv_values_per_token * (4 if dtype == "float32" else 2))
    return max(2 * context, min(tokens, 512 * context))


def _command_line(flags: dict[str, Any]) -> list[str]:
    """True is a bare flag; False and None leave it out; a list is repeated after it."""
    arguments: list[str] = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        arguments.append(f"--{name}")
        if value is not True:
            arguments += [str(item) for item in value] if isinstance(value, (list, tuple)) else [str(value)]
    return arguments
