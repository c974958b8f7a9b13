"""An engine that draws what it is told, turn by turn, and a recipe and prompts to draw it for."""

from __future__ import annotations

import numpy as np

from vespo_megatron.data.prompt_set import PromptRecord
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.rollout_sglang.engine import GenerationRequest, GenerationResult, SamplingParams


class ScriptedEngine:
    """`script` maps a request's name to its turns: (token ids, finish reason) each."""

    def __init__(self, script, version=3):
        self.script, self.version, self.calls = script, version, []

    async def generate(self, requests):
        self.calls.append(list(requests))
        return [self.answer(request) for request in requests]

    def answer(self, request):
        base, _, number = request.request_id.partition("/")
        ids, reason = self.script[base][int(number or 0)]
        ids = list(ids)[: request.sampling.max_new_tokens]
        if len(ids) < len(self.script[base][int(number or 0)][0]):
            reason = "length"
        routes = len(request.prompt_ids) + len(ids) - 1 - request.routes_start
        return GenerationResult(
            request.request_id,
            np.array(ids, dtype=np.int64),
            np.full(len(ids), -0.25, dtype=np.float32),
            np.full(len(ids), self.version),
            reason,
            routes=np.zeros((routes, 1, 2), dtype=np.uint8),
            route_versions=np.full(routes, self.version),
        )

    def prompts(self, name):
        """Of its turns, in order."""
        return [
            request.prompt_ids
            for call in self.calls
            for request in call
            if request.request_id.partition("/")[0] == name
        ]


def recipe(name="made_up_environments:Echo", **values):
    given = {
        "env.class": name,
        "env.num_environments": 0,
        "data.max_input_seq_length": 4000,
        "policy.max_total_sequence_length": 8000,
        "policy.generation.max_new_tokens": 2000,
    }
    return Recipe().with_values(given | {key.replace("__", "."): value for key, value in values.items()})


def request(name, prompt=(5, 6), longest=2000):
    return GenerationRequest(name, tuple(prompt), SamplingParams(longest), group_id="g", seed=1)


def record(prompt=(5, 6), truth="", name="p0"):
    return PromptRecord(name, tuple(prompt), "s", truth)
