"""Check of a server's version and of the HTTP contract that this package was written against.

The contract is that of 0.5.23, captured by running it. Another version is not refused for its number: it is asked for
the endpoints and request fields that are used (its own `/openapi.json` lists them), and one token is drawn and checked.
Whatever differs is reported with the version's name, at start, instead of as a riddle in the middle of a run.
"""

from __future__ import annotations

from typing import Any

from vespo_megatron.rollout_sglang.client.check import Check
from vespo_megatron.rollout_sglang.client.client import SGLangClient
from vespo_megatron.rollout_sglang.client.server_info import ServerInfo
from vespo_megatron.rollout_sglang.faults import ServerFault

VERSION = "0.5.23"

ENDPOINTS = (
    "/generate",
    "/health",
    "/server_info",
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
REQUEST_FIELDS = (
    "input_ids",
    "sampling_params",
    "rid",
    "return_logprob",
    "return_routed_experts",
    "routed_experts_start_len",
    "stream",
)


def check_contract(client: SGLangClient, info: ServerInfo) -> None:
    """Raise `ServerFault` with the server's version and what it lacks.

    Args:
        info: what it says of itself.
    """
    version = info.version
    if version is None:
        raise ServerFault(
            "does not say which SGLang it is", url=client.url, expected=f"a version, as SGLang {VERSION} does"
        )
    if version == VERSION:
        return
    try:
        missing = client.ask("/openapi.json", read=_missing)
    except ServerFault as error:
        raise foreign(error, version) from error
    if missing:
        raise foreign(ServerFault(f"has no {', no '.join(missing)}", url=client.url), version)


def _missing(check: Check, schema: Any) -> list[str]:
    """Endpoints that an OpenAPI schema does not name, and fields, if it names any."""
    parts = check.dictionary(schema, "schema")
    paths = check.dictionary(parts.get("paths", {}), "paths")
    missing = [path for path in ENDPOINTS if path not in paths]
    for name in ("components", "schemas", "GenerateReqInput", "properties"):
        parts = check.dictionary(parts.get(name, {}), name)
    return missing + [f"the field {name} of /generate" for name in REQUEST_FIELDS if parts and name not in parts]


def foreign(error: ServerFault, version: str) -> ServerFault:
    """The same fault, with the version it may be due to."""
    if version == VERSION:
        return error
    return ServerFault(
        f"SGLang {version} does not keep the contract of {VERSION}: {error.what}",
        url=error.url,
        where=error.where,
        expected=error.expected,
        fix=f"install sglang=={VERSION} in the servers' environment",
    )


def check_settings(client: SGLangClient, info: ServerInfo) -> None:
    """Raise `ServerFault` for a server that was started in a way that does not fit the recipe."""
    if info.context_length is not None and info.context_length < client.context_length:
        raise ServerFault(
            f"serves a context of {info.context_length} tokens",
            url=client.url,
            expected=f"{client.context_length}",
            fix="restart it with --context-length",
        )
    if client.return_routes and not info.returns_routes:
        fix = "restart it with --enable-return-routed-experts"
        raise ServerFault("returns no routes", url=client.url, fix=fix)
    if info.replicas != 1:
        expected = "tensor parallel alone"
        raise ServerFault("has data- or pipeline-parallel replicas", url=client.url, expected=expected)
