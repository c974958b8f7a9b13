"""Calls of SGLang's `/weights_checker`, where our plugin answers in every rank of a server (`plugin/weights.py`)."""

from __future__ import annotations

from typing import Any

from vespo_megatron.errors import UserError
from vespo_megatron.rollout_sglang.client.check import Check
from vespo_megatron.rollout_sglang.client.client import SGLangClient
from vespo_megatron.rollout_sglang.faults import HttpRefused, PluginMissing
from vespo_megatron.rollout_sglang.plugin.actions import ERROR_KEY

_BAD_REQUEST = 400


def ask_weights(client: SGLangClient, action: str, timeout_s: float) -> list[dict[str, str]]:
    """What the plugin answers to `action` (`plugin.actions`): one dictionary per tensor parallel rank of the server.

    Raises:
        PluginMissing: SGLang does not know the action.
        ServerFault: what else went wrong in the server, or on the way to it.
    """
    try:
        return client.ask(
            "/weights_checker", {"action": action, "selector": "target"}, read=_by_rank, timeout_s=timeout_s
        )
    except HttpRefused as error:
        if (error.status, error.message) == (_BAD_REQUEST, _unknown(action)):
            raise PluginMissing(url=client.url) from error
        raise


def _by_rank(check: Check, reply: Any) -> list[dict[str, str]]:
    """The ranks' answers, in the order of the ranks."""
    answers: dict[int, dict[str, str]] = {}
    for answer in check.sequence(check.dictionary(reply, "reply").get("ranks"), "ranks"):
        rank = check.dictionary(answer, "rank")
        places = check.sequence(rank.get("parallelism_info"), "parallelism_info")
        place = check.dictionary(places[0] if places else None, "parallelism_info").get("tp_rank")
        values = check.dictionary(rank.get("checksums"), "checksums")
        if ERROR_KEY in values:
            raise UserError(check.text(values[ERROR_KEY], ERROR_KEY), where=check.where)
        answers[check.whole_number(place, "tp_rank")] = {
            name: check.text(value, name) for name, value in values.items()
        }
    check.that(sorted(answers) == list(range(len(answers))) != [], f"ranks {sorted(answers)}", "all, from 0")
    return [answers[rank] for rank in sorted(answers)]


def _unknown(action: str) -> str:
    """SGLang 0.5.23's whole answer to an action it does not know (`WeightChecker.handle`); it has no code for it."""
    return f"Unsupported {action=}"
