"""Calls of SGLang's `/weights_checker`, where our plugin answers in every rank of a server (`plugin/weights.py`)."""

from __future__ import annotations

from vespo_megatron.rollout_sglang.client.client import SGLangClient
from vespo_megatron.rollout_sglang.faults import HttpRefused, PluginMissing, ServerFault
from vespo_megatron.rollout_sglang.plugin.actions import ERROR_KEY

_BAD_REQUEST = 400


def ask_weights(client: SGLangClient, action: str, timeout_s: float) -> list[dict[str, str]]:
    """What the plugin answers to `action` (`plugin.actions`): one dictionary per tensor parallel rank of the server.

    Raises:
        PluginMissing: SGLang does not know the action.
        ServerFault: what else went wrong in the server, or on the way to it.
    """
    try:
        reply = client.call("/weights_checker", {"action": action, "selector": "target"}, timeout_s=timeout_s)
    except HttpRefused as error:
        if (error.status, error.message) == (_BAD_REQUEST, _unknown(action)):
            raise PluginMissing(url=client.url) from error
        raise
    for rank in reply["ranks"]:
        if ERROR_KEY in rank["checksums"]:
            where = f"server {client.url} /weights_checker"
            raise ServerFault(rank["checksums"][ERROR_KEY], url=client.url, where=where)
    return [rank["checksums"] for rank in sorted(reply["ranks"], key=lambda r: r["parallelism_info"][0]["tp_rank"])]


def _unknown(action: str) -> str:
    """SGLang 0.5.23's whole answer to an action it does not know (`WeightChecker.handle`); it has no code for it."""
    return f"Unsupported {action=}"
