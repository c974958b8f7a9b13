"""Over-sampling: the first whole groups are taken, the rest ended, and either lost or gone on with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from listed_prompts import ListedPrompts
from simulated_engine import SimulatedEngine, lognormal_length
from test_controller import Logger, Rewards, Tokenizer

from vespo_megatron.controller.controller import Controller
from vespo_megatron.controller.sampler import tail_share
from vespo_megatron.data.prompt_set import PromptRecord
from vespo_megatron.data.prompt_stream import PromptStream
from vespo_megatron.recipe.schema import Recipe

PROMPTS, RESPONSES, STEPS, NUMBER = 16, 4, 40, 4000


@pytest.fixture
def build():
    built = []

    def build(length=None, scores=lambda n: float(n % 2), prompts=NUMBER, **settings):
        values = {
            "grpo.num_prompts_per_step": PROMPTS,
            "grpo.num_generations_per_prompt": RESPONSES,
            "policy.max_total_sequence_length": 100_000,
            "policy.generation.max_new_tokens": 50_000,
        }
        recipe = Recipe().with_values(values | {name.replace("__", "."): value for name, value in settings.items()})
        records = ListedPrompts([PromptRecord(f"p{i}", (5, i), "sums", "4") for i in range(prompts)])
        engine = SimulatedEngine(length or lognormal_length())
        controller = Controller(
            recipe, engine, Tokenizer(), PromptStream(records, seed=1), [], Rewards(scores), Logger()
        )
        built.append(controller)
        return controller

    yield build
    for controller in built:
        controller.close()


def run(controller, steps=STEPS):
    """(ticks a step, mean length of what is trained on, batches)."""
    batches, ticks = [], []
    for step in range(1, steps + 1):
        before = controller.engine.ticks
        batches.append(controller.collect(step))
        ticks.append(controller.engine.ticks - before)
        controller.update_weights(iter(()), step)
    lengths = [len(sample.response_ids) for each in batches for sample in each.batch.samples]
    return np.mean(ticks), np.mean(lengths), batches


OVER = {"grpo__oversample": 1.25}


def test_a_quarter_more_groups_shorten_a_step_with_a_heavy_tail_by_more_than_a_quarter(build):
    """Lengths are lognormal (σ 1), a step ends with its longest response.

    What is trained on is shorter: a bias, which going on with what was ended takes away.
    """
    plain, length, _ = run(build())
    lost, short, _ = run(build(**OVER))
    gone_on, fair, _ = run(build(**OVER, grpo__partial_rollouts=True))
    print(f"ticks a step: {plain:.0f}, {lost:.0f} where they are lost, {gone_on:.0f} gone on with")
    print(f"mean length: {length:.1f}, {short / length - 1:+.1%} and {fair / length - 1:+.1%}")
    assert lost < 0.75 * plain and gone_on < 0.75 * plain
    assert short < 0.95 * length, "the bias that the pages tell"
    assert abs(fair / length - 1) < 0.05


def test_every_step_has_its_groups_whole_and_no_prompt_twice(build):
    for settings in ({}, {"grpo__partial_rollouts": True}):
        controller = build(**OVER, **settings)
        length = controller.engine.length
        _, _, batches = run(controller, 6)
        trained = []
        for each in batches:
            samples = each.batch.samples
            assert len(samples) == PROMPTS * RESPONSES
            assert all(sample.finish_reason == "stop" for sample in samples)
            for sample in samples:
                index = int(sample.sample_id.split("/")[2])
                assert len(sample.response_ids) == length(tuple(sample.prompt_ids.tolist()), index)
            trained += sorted({sample.prompt_id for sample in samples})
        assert len(trained) == len(set(trained)) == 6 * PROMPTS


def test_what_was_ended_goes_on_with_its_tokens_each_by_the_weights_that_drew_it(build):
    controller = build(**OVER, grpo__partial_rollouts=True)
    _, _, batches = run(controller, 8)
    assert [each.metrics["rollout/carried_groups"] for each in batches] == [0.0] + [4.0] * 7
    assert max(each.metrics["staleness/lag_max"] for each in batches) >= 1
    partial = 0
    for each in batches:
        for sample in each.batch.samples:  # the engine's tokens are its version
            np.testing.assert_array_equal(sample.response_ids, sample.weight_versions)
            partial += len(set(sample.weight_versions.tolist())) > 1
    assert partial > 0 and sum(each.metrics.get("rollout/discarded_tokens", 0.0) for each in batches) == 0


def test_lost_tokens_are_counted(build):
    metrics = build(**OVER).collect(1).metrics
    assert metrics["rollout/ended_groups"] == 4 and metrics["rollout/discarded_tokens"] > 0


def test_resumed_without_partial_rollouts_the_prompts_that_were_begun_come_first(build):
    controller = build(**OVER, grpo__partial_rollouts=True)
    controller.collect(1)
    again, said = build(), []
    again.logger.print = said.append
    again.load_state_dict(controller.state_dict())
    begun = {group.record.prompt_id for group in controller.source._begun}
    assert {record.prompt_id for record in again.parts.prompts.take(4)} == begun
    assert said == ["rollouts of before: 4 groups are drawn anew"]


def test_dynamic_sampling_refills_exactly_what_is_missing(build):
    """The first half of the first sixteen groups carries no signal: eight are missing, for which ten are begun."""
    flat = range(8 * RESPONSES)
    controller = build(scores=lambda n: 1.0 if n in flat else float(n % 2), grpo__use_dynamic_sampling=True, **OVER)
    batch = controller.collect(1)
    assert len(batch.batch) == PROMPTS * RESPONSES and batch.metrics["rollout/sampling_rounds"] == 2
    assert batch.metrics["rollout/ended_groups"] == 4 + 2 and batch.metrics["advantage/groups"] == PROMPTS + 8


def test_resumed_it_goes_on_as_if_it_had_not_stopped(build, tmp_path):
    settings = OVER | {"grpo__partial_rollouts": True}
    controller = build(**settings)
    run(controller, 3)
    torch.save(controller.state_dict(), tmp_path / "state")
    again = build(**settings)
    again.logger.print = lambda text: None
    again.engine._drawn, again.engine.ticks = dict(controller.engine._drawn), controller.engine.ticks
    again.engine.weight_version = controller.engine.weight_version
    again.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for step in (4, 5):
        expected, found = controller.collect(step), again.collect(step)
        assert found.metrics == expected.metrics
        for ours, theirs in zip(found.batch.samples, expected.batch.samples, strict=True):
            assert ours.sample_id == theirs.sample_id
            np.testing.assert_array_equal(ours.weight_versions, theirs.weight_versions)


def test_the_tail_is_what_comes_after_four_of_five_have_ended():
    assert tail_share(np.array([10, 10, 10, 10, 40])) == 0.75 and tail_share(np.array([7] * 9)) == 0.0
    assert tail_share(np.array([0, 0])) == 0.0


def test_a_set_too_small_for_what_is_begun_is_an_error_not_an_endless_search(build):
    from vespo_megatron.errors import UserError

    controller = build(prompts=18, **OVER, grpo__partial_rollouts=True)
    with pytest.raises(UserError, match="training prompts|finds no other prompt"):
        run(controller, 2)
