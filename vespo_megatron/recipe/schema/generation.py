"""Keys of generation: `policy.generation`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from vespo_megatron.recipe.schema.base import Section, key, section
from vespo_megatron.recipe.schema.mismatch import MismatchConfig

MAX_SAMPLING_MASK_TOKENS = 4096
"""Tokens of a truncated distribution that SGLang 0.5.23 reports at most (`--sampling-mask-max-tokens`)."""


def _some(top_k: int) -> int:
    if top_k == 0:
        raise ValueError("is 0")
    return top_k


TopK = Annotated[int, Field(ge=-1, json_schema_extra={"not": {"const": 0}}), AfterValidator(_some)]
"""Tokens to draw from, the most likely ones; -1: all."""
TokenId = Annotated[int, Field(ge=0)]


class SGLangConfig(Section):
    """`policy.generation.sglang_cfg`: the servers. Unknown keys under `server_args` go to the server's flags."""

    num_servers: int = key(1, "Servers to start; ignored when `urls` is set.", ge=1, ours=True)
    urls: list[str] = key([], "Servers that already run; nothing is started.", ours=True)
    python: str | None = key(None, "Interpreter of the servers' environment; None: this one.", ours=True)
    host: str = key("127.0.0.1", "Address the servers listen on.", ours=True)
    port: int = key(0, "First port; 0 picks free ones.", ge=0, le=65535, ours=True)
    tensor_parallel_size: int = key(1, "TP of one server.", ge=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key("auto", "Server numerics: auto is policy.precision.")
    context_length: int | None = key(None, "None: policy.max_total_sequence_length.", ge=1)
    mem_fraction_static: float | None = key(None, "Share of device memory for weights and KV cache.", gt=0, lt=1)
    max_total_tokens: int | None = key(None, "Size of the KV cache in tokens (CPU).", ge=1, ours=True)
    enable_return_routed_experts: bool = key(False, "Return the experts chosen per token (R3 and route agreement).")
    startup_timeout: float = key(300.0, "Deadline for a server to be ready, in seconds.", gt=0, ours=True)
    weight_update_timeout: float = key(
        300.0, "Deadline of each wait of a weight update: joining, one bucket, the checksum.", gt=0, ours=True
    )
    request_timeout: float = key(600.0, "Deadline of one generation request, in seconds.", gt=0, ours=True)
    health_timeout: float = key(60.0, "A working server silent for so long is given up; 0: never.", ge=0, ours=True)
    max_restarts: int = key(3, "Times that a server started here is started again after it died.", ge=0, ours=True)
    recovery_timeout: float = key(
        300.0, "How long to wait for a server to come back when none is left.", gt=0, ours=True
    )
    api_key: str | None = key(
        None, "The servers' key; better in $VESPO_SGLANG_API_KEY. Never saved nor logged.", ours=True
    )
    max_concurrent_requests: int = key(1024, "Requests in flight per server.", ge=1, ours=True)
    weight_transport: Literal["distributed", "tensor", "disk"] = key(
        "distributed", "How new weights reach the servers.", ours=True
    )
    weight_folder: str | None = key(None, "Folder of transport disk, shared; None: in the run directory.", ours=True)
    weight_bucket_bytes: int = key(
        268435456, "Half of the memory that a weight update takes on the trainer.", ge=8, ours=True
    )
    weight_sync_only_changed: bool = key(
        False, "Send only tensors whose hash changed since the last update.", ours=True
    )
    colocated: bool = key(False, "Servers on the trainer's devices give their memory back while it trains.", ours=True)
    first_server: int = key(
        0, "Number of this node's first server among a run's: each has a seed of its own.", ge=0, ours=True
    )
    server_args: dict[str, Any] = key({}, "Further server flags, without the dashes.", ours=True)

    @property
    def weight_piece_bytes(self) -> int:
        """What is gathered from the ranks at a time; it and a tensor joined from it fit beside two smaller buckets."""
        return self.weight_bucket_bytes // 8


class GenerationConfig(Section):
    """`policy.generation`."""

    backend: Literal["sglang", "in_process"] = key(
        "sglang", "What generates: SGLang's servers, or transformers in this process."
    )
    max_new_tokens: int = key(512, "Response tokens at most.", ge=1)
    temperature: float = key(
        1.0,
        "Of training's responses; log-probs are those of this temperature.",
        gt=0,
        fix="for greedy evaluation set policy.generation.val_temperature=0",
    )
    top_p: float = key(1.0, "Below 1 π, too, is taken over the tokens that μ could draw.", gt=0, le=1)
    top_k: TopK | None = key(
        None,
        "None: all. SGLang wants one, of at most 4096, beside a top_p below 1 or a min_p.",
        expected="at least 1, or null for all",
    )
    min_p: float = key(
        0.0,
        "Tokens below this share of the likeliest one's probability are pruned, from μ and π alike; 0: none.",
        ge=0,
        lt=1,
        ours=True,
    )
    stop_token_ids: list[TokenId] = key(
        [], "Tokens that end a response; empty: all that the model's folder and the tokenizer name."
    )
    val_temperature: float | None = key(
        None, "Evaluation; None: as in training. 0 is greedy.", ge=0, expected="at least 0 (greedy)", ours=True
    )
    val_top_p: float | None = key(None, "Evaluation; None: as in training.", gt=0, le=1, ours=True)
    mismatch: MismatchConfig = section(MismatchConfig)
    sglang_cfg: SGLangConfig = section(SGLangConfig)

    @property
    def shares_devices(self) -> bool:
        """Whether servers and trainer take turns on the same devices."""
        return self.backend == "sglang" and self.sglang_cfg.colocated
