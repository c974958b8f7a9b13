"""Rounds of rollouts and weight updates, as a trainer has them, over servers that may fail.

`weights` is a function that gives a stream of all tensors, anew each time.
"""

from __future__ import annotations

from rollout_helpers import generate, make_requests

from vespo_megatron.rollout_sglang.faults import WeightsNeeded


def push(engine, version, weights):
    """As the trainer does: an update in which a server failed is made again."""
    for _ in range(8):
        try:
            return engine.update_weights(weights(), version)
        except WeightsNeeded:
            continue
    raise AssertionError("no end of updates")


def a_round(engine, version, weights):
    """A rollout, an update, a rollout: every prompt is answered once."""
    for number in range(2):
        requests, seen = make_requests(4, max_new_tokens=2), []
        results = draw(engine, requests, seen, version + number, weights)
        assert [result.request_id for result in results] == [request.request_id for request in requests]
        assert sorted(result.request_id for result in seen) == sorted(request.request_id for request in requests)
        if number == 0:
            push(engine, version + 1, weights)


def draw(engine, requests, seen, version, weights):
    """All of them, with weights for servers that are back."""
    answers = {}
    for _ in range(4):
        missing = [request for request in requests if request.request_id not in answers]

        def note(result):
            seen.append(result)
            answers[result.request_id] = result

        try:
            generate(engine, missing, on_result=note)
            return [answers[request.request_id] for request in requests]
        except WeightsNeeded:
            push(engine, version, weights)
    raise AssertionError("no end of weights")
