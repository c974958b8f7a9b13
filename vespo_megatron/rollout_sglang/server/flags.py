"""From a recipe to one SGLang server's command line and environment: pure, so that it is tested without a server."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.rollout_sglang.model_shape import ModelShape

STUBS = Path(__file__).parents[1] / "plugin" / "stubs"
_CPU_KV_BYTES = 512 * 2**20
"""KV cache of a CPU server when the recipe does not say: SGLang would take most of the machine's memory."""

_CONTEXT_MARGIN = 8
"""SGLang 0.5.23 refuses a prompt within 6 tokens of its context; the client holds to the real length."""

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
}


@dataclass(frozen=True)
class Environment:
    """What was found in the interpreter that will run the server (`server.probe_environment`)."""

    device: str
    """cuda or cpu"""
    sglang_folder: Path
    has_torchvision: bool
    has_plugin: bool


def check_server_args(server_args: dict[str, Any]) -> None:
    """Refuse, with the reason, flags that the recipe owns or that break RL."""
    for name in server_args:
        flag = name.lstrip("-").replace("_", "-")
        where = f"policy.generation.sglang_cfg.server_args.{name}"
        if flag in _OWNED:
            raise UserError("is decided by another key", where=where, fix=f"set {_OWNED[flag]}")
        if flag.startswith("speculative-"):
            raise UserError("is refused: the draft model would keep its old weights", where=where, fix="remove it")
        if flag in _REFUSED:
            raise UserError(f"is refused: {_REFUSED[flag]}", where=where, fix="remove it")


def build_flags(recipe: Recipe, shape: ModelShape, environment: Environment, *, port: int, index: int) -> list[str]:
    """Arguments after `python -m sglang.launch_server` for server number `index` on this node.

    Raises `UserError` for a flag that is refused or a context that the model does not have.
    """
    config = recipe.policy.generation.sglang_cfg
    check_server_args(config.server_args)
    context = context_length(recipe, shape)
    dtype = recipe.policy.precision if config.dtype == "auto" else config.dtype
    flags: dict[str, Any] = {
        "model-path": recipe.policy.model_name,
        "host": config.host,
        "port": port,
        "device": environment.device,
        "dtype": dtype,
        "tensor-parallel-size": config.tensor_parallel_size,
        "context-length": context + _CONTEXT_MARGIN,
        "skip-tokenizer-init": True,  # token ids in, token ids out: nothing is ever tokenised twice
        "random-seed": recipe.grpo.seed + index,
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
        flags["base-gpu-id"] = index * config.tensor_parallel_size
        flags["enable-memory-saver"] = config.colocated  # needs CUDA: without, the endpoints answer and free nothing
    flags |= {name.lstrip("-").replace("_", "-"): value for name, value in config.server_args.items()}
    return _command_line(flags)


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


def build_environment(
    environment: Environment,
    shape: ModelShape,
    *,
    base: dict[str, str],
    threads: dict[str, str],
    tensor_parallel_size: int,
) -> dict[str, str]:
    """Environment variables of the server; `threads` (`recipe.host_threads`) where it computes on the CPU.

    What belongs to the launching process's own distributed job (`RANK`, `MASTER_PORT`, …) is left out, so that a
    server started from inside one does not believe itself a member.
    """
    foreign = (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "ROLE_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "OMP_NUM_THREADS",
    )
    result = {
        name: value for name, value in base.items() if name not in foreign and not name.startswith("TORCHELASTIC_")
    }
    result["PYTHONUNBUFFERED"] = "1"
    result["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"  # for the margin of the context
    if environment.device != "cpu":
        return result
    result |= threads
    result |= {
        "CUDA_VISIBLE_DEVICES": "",
        "SGLANG_USE_CPU_ENGINE": "0",
        "SGLANG_PLATFORM": "vespo_cpu",
        "SGLANG_DISABLED_MODEL_ARCHS": ",".join(unused_model_files(environment.sglang_folder, shape.architecture)),
        "GLOO_SOCKET_IFNAME": base.get("GLOO_SOCKET_IFNAME", "lo"),
    }
    if tensor_parallel_size > 1:
        cores, share = sorted(os.sched_getaffinity(0)), int(threads["OMP_NUM_THREADS"])
        groups = [cores[rank * share % len(cores) :][:share] for rank in range(tensor_parallel_size)]
        result["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, group)) for group in groups)
    if not environment.has_torchvision:
        result["PYTHONPATH"] = os.pathsep.join(filter(None, [str(STUBS), base.get("PYTHONPATH", "")]))
    return result


def unused_model_files(sglang_folder: Path, architecture: str) -> list[str]:
    """Stems of SGLang's model files that do not define `architecture`: importing all of them costs ~45 s of start.

    Files that the needed one imports are still imported: this only keeps SGLang's registry from doing so. An empty
    list when no file defines it, so that SGLang says itself what it supports.
    """
    files = sorted((sglang_folder / "srt" / "models").glob("*.py"))
    needed = {file for file in files if f"class {architecture}(" in file.read_text(errors="replace")}
    return [file.stem for file in files if file not in needed and file.stem != "__init__"] if needed else []


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
