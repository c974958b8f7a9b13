"""Work that waits for weights in its middle, and a trainer that pushes them and comes back."""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
from listed_prompts import ListedPrompts

from vespo_megatron.controller.controller import Controller
from vespo_megatron.controller.interruptible import Interruptible
from vespo_megatron.data.prompt_set import PromptRecord
from vespo_megatron.data.prompt_stream import PromptStream
from vespo_megatron.errors import UserError
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.rewards import RewardResult
from vespo_megatron.rollout_sglang.engine import GenerationResult
from vespo_megatron.rollout_sglang.faults import WeightsNeeded
from vespo_megatron.trainer.controller_link import ControllerLink


def test_work_is_left_for_weights_and_goes_on_where_it_was():
    interruptible, did = Interruptible(), []

    def work():
        did.append("before")
        interruptible.await_weights(WeightsNeeded("back", where="server a"))
        did.append("after")
        return 7

    with pytest.raises(WeightsNeeded, match="server a"):
        interruptible.run(work)
    assert did == ["before"]
    assert interruptible.run(lambda: pytest.fail("the work that waits goes on instead")) == 7
    assert did == ["before", "after"]
    assert interruptible.run(lambda: 8) == 8


def test_an_error_of_the_work_is_the_callers_and_the_next_work_runs():
    interruptible = Interruptible()
    with pytest.raises(ZeroDivisionError):
        interruptible.run(lambda: 1 // 0)
    assert interruptible.run(lambda: 8) == 8


def test_work_that_waits_does_not_outlive_the_end():
    others = set(threading.enumerate())
    interruptible = Interruptible()
    with pytest.raises(WeightsNeeded):
        interruptible.run(lambda: interruptible.await_weights(WeightsNeeded("back")))
    interruptible.close()
    deadline = time.monotonic() + 5
    while set(threading.enumerate()) - others:
        assert time.monotonic() < deadline
        time.sleep(0.01)


class FailingEngine:
    """Loses its last server after the third and the fifth response; notes every response it draws."""

    description = "an engine"

    def __init__(self):
        self.drawn, self.updates, self.fails_at, self.version = [], [], [3, 5], 0

    async def generate(self, requests, *, on_result=None):
        results = []
        for request in requests:
            if self.fails_at and len(self.drawn) == self.fails_at[0]:
                del self.fails_at[0]
                raise WeightsNeeded("back", where="server a")
            drawn = np.arange(3), np.full(3, -1.0), np.full(3, self.version)
            results.append(GenerationResult(request.request_id, *drawn, "stop"))
            self.drawn.append(request.request_id)
            if on_result is not None:
                on_result(results[-1])
        return results

    def update_weights(self, stream, version):
        self.updates.append((list(stream), version))
        self.version = version

    async def pause(self):
        pass

    resume = pause

    def metrics(self):
        return {"rollout/servers": 1.0}

    def close(self):
        pass


class Rewards:
    async def score(self, requests):
        return [RewardResult(float(i % 2), {}) for i in range(len(requests))]

    def close(self):
        pass


class LinkOfOne(ControllerLink):
    """There are no other ranks to raise on."""

    def _raise_everywhere(self, failure):
        if failure is not None:
            raise failure


def build(engine, **settings):
    """Rank 0's link with a real controller; one process in place of the ranks."""
    values = {"grpo.num_prompts_per_step": 4, "grpo.num_generations_per_prompt": 2}
    recipe = Recipe().with_values(values | {name.replace("__", "."): value for name, value in settings.items()})
    records = ListedPrompts([PromptRecord(f"p{i}", (5, 6), "sums", "4") for i in range(64)])
    tokenizer = SimpleNamespace(eos_token_id=1, decode=lambda ids, **_: "text")
    logger = SimpleNamespace(log_samples=lambda *_, **__: None, log_problems=lambda *_: None)
    controller = Controller(recipe, engine, tokenizer, PromptStream(records, seed=1), records[:6], Rewards(), logger)
    exporter = SimpleNamespace(stream=lambda: iter(["tensor"] * 4))
    policy = SimpleNamespace(exporter=exporter, rank_info=SimpleNamespace(rank=0), updates_taken=0, memory=None)
    link = LinkOfOne(policy, controller, None)
    link.weight_version = 5
    return link, controller


def test_a_rollout_goes_on_after_its_last_server_was_given_its_weights():
    engine = FailingEngine()
    link, controller = build(engine)
    rollout = link.call_with_servers(lambda controller: controller.collect(1))
    assert engine.updates == [(["tensor"] * 4, 5)] * 2
    names = [sample.sample_id for sample in rollout.batch.samples]
    assert sorted(engine.drawn) == sorted(names) and len(set(names)) == 8, "each prompt drawn once, none lost"
    taken = {sample.prompt_id for sample in rollout.batch.samples}
    following = link.call_with_servers(lambda controller: controller.collect(2))
    assert not taken & {sample.prompt_id for sample in following.batch.samples}
    controller.close()


def test_an_evaluation_goes_on_too():
    engine = FailingEngine()
    link, controller = build(engine)
    ended = link.call_with_servers(lambda controller: controller.evaluate(0))
    assert "eval/sums/avg@1" in ended[0] and len(engine.drawn) == 6 and len(engine.updates) == 2
    controller.close()


def test_an_evaluation_beside_training_goes_on_too():
    """Nobody is at hand to push weights but the thread that waits for the scores."""
    engine = FailingEngine()
    engine.fails_at = [3]
    link, controller = build(engine, grpo__async_grpo__enabled=True)
    assert link.call_with_servers(lambda controller: controller.evaluate(0)) == {}
    ended = link.call_with_servers(lambda controller: controller.await_evaluations())
    assert "eval/sums/avg@1" in ended[0] and len(engine.updates) == 1
    assert len([name for name in engine.drawn if name.startswith("validation")]) == 6
    controller.close()


def test_weights_that_were_updated_since_the_last_version_have_a_number_of_their_own():
    """Of four steps a version the second is under way: what a server that comes back gets is no version yet."""
    engine = FailingEngine()
    engine.fails_at = [3]
    link, controller = build(engine, grpo__async_grpo__enabled=True, grpo__async_grpo__sync_every=4)
    buffer = controller.source.buffer
    link.push_weights(5)
    link.policy.updates_taken = 1
    link.call_with_servers(lambda controller: controller.collect(2))
    assert [version for _, version in engine.updates] == [5, 6] and link.weight_version == buffer.version == 6
    assert buffer.lag(5) == 0 and buffer.taken == 4
    link.push_again()
    assert [version for _, version in engine.updates] == [5, 6, 6], "the same weights once more"
    link.policy.updates_taken = 3
    link.push_weights(link.weight_version + 1)
    assert buffer.version == 7 and (buffer.lag(5), buffer.lag(6), buffer.taken) == (1, 1, 0)
    controller.close()


@pytest.mark.parametrize("behind", [False, True])
def test_a_resumed_run_gives_weights_that_were_no_version_a_number_of_their_own(behind):
    engine = FailingEngine()
    link, controller = build(engine, grpo__async_grpo__enabled=True, grpo__async_grpo__sync_every=4)
    link.push_weights(5)
    link.policy.updates_taken += behind
    state = link.state_dict()
    resumed, other = build(engine, grpo__async_grpo__enabled=True, grpo__async_grpo__sync_every=4)
    other.source.buffer.version = 5
    resumed.load_state_dict(state)
    resumed.push_again()
    assert resumed.weight_version == other.source.buffer.version == 5 + behind
    assert other.source.buffer.lag(5) == 0
    for each in (controller, other):
        each.close()


def test_a_run_that_knows_its_versions_gives_servers_what_the_number_means():
    engine = FailingEngine()
    link, controller = build(engine, grpo__async_grpo__enabled=True)
    pushed = []
    link.history = SimpleNamespace(pushing=lambda version: nullcontext(pushed.append(version)), live=5)
    link.push_weights(5)
    link.policy.updates_taken, link.history.live = 1, None
    link.push_again()
    assert pushed == [5, 5] and link.weight_version == 5
    assert link.engine_is_behind, "with another `behavior` from here on, the same weights cannot be had again"
    controller.close()


class RefusingEngine(FailingEngine):
    """Fails its first updates after some tensors, as an engine of several servers does when one refuses."""

    def __init__(self, failures, error=WeightsNeeded):
        super().__init__()
        self.failures, self.error = failures, error

    def update_weights(self, stream, version):
        next(iter(stream))
        if len(self.updates) < self.failures:
            self.updates.append("failed")
            raise self.error("failed there", where="server a")
        self.updates.append(len(list(stream)) + 1)


def test_an_update_that_one_server_failed_is_made_again_from_the_start():
    streams = []
    link, controller = build(RefusingEngine(2))

    def stream():
        streams.append(iter(["tensor"] * 4))
        return streams[-1]

    link.policy.exporter.stream = stream
    link.push_weights(6)
    assert controller.engine.updates == ["failed", "failed", 4] and link.weight_version == 6
    assert all(next(each, "empty") == "empty" for each in streams), "the other ranks wait for all of a stream"
    controller.close()


def test_an_update_that_cannot_be_made_is_the_error_and_no_rank_waits():
    link, controller = build(RefusingEngine(1, UserError))
    with pytest.raises(UserError, match="server a"):
        link.push_weights(6)
    assert link.weight_version == 5
    controller.close()
