"""Which SGLang a server is, and whether it keeps the contract this package was written against.

The contract is that of 0.5.23, captured by running it. Another version is not refused for its number: it is asked for
the endpoints and request fields that are used (its own `/openapi.json` lists them), and one token is drawn and checked.
Whatever differs is reported with the version's name, at start, instead of as a riddle in the middle of a run.
"""

from __future__ import annotations

from typing import Any

from vespo_megatron.errors import UserError
from vespo_megatron.rollout_sglang.client.client import SGLangClient

VERSION = "0.5.23"

ENDPOINTS = (
    "/generate",
    "/health",
    "/model_info",
    "/abort_request",
    "/pause_generation",
    "/continue_generation",
    "/flush_cache",
    "/begin_weight_update",
    "/end_weight_update",
    "/init_weights_update_group",
    "/destroy_weights_update_group",
    "/update_weights_from_distributed",
    "/update_weight_version",
    "/weights_checker",
)
REQUEST_FIELDS = ("input_ids", "sampling_params", "rid", "return_logprob", "return_routed_experts", "stream")


def check_contract(client: SGLangClient, info: dict[str, Any]) -> None:
    """Raise `UserError` naming the server, its version and what it lacks.

    Args:
        info: its `/server_info`.
    """
    version = info.get("version")
    where = f"server {client.url}"
    if version is None:
        raise UserError("does not say which SGLang it is", where=where, expected=f"a version, as SGLang {VERSION} does")
    if version == VERSION:
        return
    try:
        schema = client.call("/openapi.json")
    except UserError as error:
        raise foreign(error, version) from error
    missing = [path for path in ENDPOINTS if path not in schema.get("paths", {})]
    fields = schema.get("components", {}).get("schemas", {}).get("GenerateReqInput", {}).get("properties")
    if fields is not None:
        missing += [f"the field {name} of /generate" for name in REQUEST_FIELDS if name not in fields]
    if missing:
        raise foreign(UserError(f"has no {', no '.join(missing)}", where=where), version)


def foreign(error: UserError, version: str) -> UserError:
    """The same error, with the version it may be due to."""
    if version == VERSION:
        return error
    return UserError(
        f"SGLang {version} does not keep the contract of {VERSION}: {error.what}",
        where=error.where,
        expected=error.expected,
        fix=f"install sglang=={VERSION} in the servers' environment",
    )


def check_settings(client: SGLangClient, info: dict[str, Any]) -> None:
    """Raise `UserError` for a server that was started in a way that does not fit the recipe."""
    where = f"server {client.url}"
    allowed = info.get("context_length")
    if allowed is not None and allowed < client.context_length:
        raise UserError(
            f"serves a context of {allowed} tokens",
            where=where,
            expected=f"{client.context_length}",
            fix="restart it with --context-length",
        )
    if client.return_routes and not info.get("enable_return_routed_experts", True):
        raise UserError("returns no routes", where=where, fix="restart it with --enable-return-routed-experts")
    if info.get("dp_size", 1) != 1 or info.get("pp_size", 1) != 1:
        raise UserError("has data- or pipeline-parallel replicas", where=where, expected="tensor parallel alone")
