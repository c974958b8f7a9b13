"""The source of prompts: what is given back comes first, what rests is passed over, a resume goes on with all of it."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from listed_prompts import ListedPrompts

from vespo_megatron.data.prompt_set import PromptRecord
from vespo_megatron.data.prompt_source import PromptSource
from vespo_megatron.data.prompt_stream import PromptStream, WeightedStreams
from vespo_megatron.errors import UserError
from vespo_megatron.recipe.schema import CurriculumConfig


def stream(count=12, name="p", seed=1):
    return PromptStream(ListedPrompts([PromptRecord(f"{name}{i}", (5, i), "s", "4") for i in range(count)]), seed=seed)


def weighted():
    return WeightedStreams({"a": stream(8, "a"), "b": stream(5, "b")}, {"a": 3.0, "b": 1.0}, seed=2)


def names(records):
    return [record.prompt_id for record in records]


@pytest.mark.parametrize("make", [stream, weighted])
def test_where_nothing_is_given_back_and_nothing_rests_the_prompts_are_the_stream_s(make):
    source, plain = PromptSource(make()), make()
    for count in (3, 1, 4, 2):
        assert names(source.take(count)) == names(plain.take(count))


def test_what_is_given_back_comes_first_and_then_the_stream_goes_on():
    source, plain = PromptSource(stream()), names(stream().take(9))
    taken = source.take(5)
    source.give_back(taken[3:])
    assert names(source.take(3)) == plain[3:6] and names(source.take(3)) == plain[6:9]


def test_what_a_batch_has_already_comes_after_it():
    source, plain = PromptSource(stream()), names(stream().take(6))
    assert names(source.take(3, avoid=plain[:2])) == plain[2:5]
    assert names(source.take(3)) == [*plain[:2], plain[5]]


def test_a_set_that_has_no_other_prompt_is_an_error():
    source = PromptSource(stream(4))
    with pytest.raises(
        UserError, match=r"data\.train: finds no other prompt: the batch has 1 of 2, and 3 are under way"
    ):
        source.take(2, avoid=["p0", "p1", "p2"])


def test_prompts_solved_too_often_or_too_seldom_rest_as_often_as_the_recipe_says():
    source = PromptSource(stream(6), CurriculumConfig(rest=2, min_solved=0.1, max_solved=0.9))
    source.report({"p0": 1.0, "p1": 0.0, "p2": 0.5, "p3": 0.9, "p4": 0.1})
    seen = [Counter(names(source.take(4))) for _ in range(2)]  # two epochs of the four that are left
    assert seen == [Counter(["p2", "p3", "p4", "p5"])] * 2 and source.metrics() == {"rollout/passed_over": 4.0}
    assert sorted(names(source.take(6))) == [f"p{i}" for i in range(6)], "they have rested"


def test_by_default_no_prompt_rests():
    source = PromptSource(stream(6))
    source.report({f"p{i}": 1.0 for i in range(6)})
    assert len(source.take(6)) == 6 and source.metrics() == {}


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.integers(1, 4)),
        st.tuples(st.just("give_back"), st.integers(0, 4)),
        st.tuples(st.just("report"), st.sampled_from([0.0, 0.5, 1.0])),
    ),
    max_size=12,
)


@given(st.sampled_from([stream, weighted]), ACTIONS, ACTIONS)
def test_resumed_at_any_place_it_goes_on_as_if_it_had_not_stopped(make, before, after):
    def new():
        return PromptSource(make(), CurriculumConfig(rest=1, min_solved=0.2, max_solved=0.8))

    def act(source, actions, held):
        taken = []
        for kind, value in actions:
            if kind == "take":
                held = source.take(value)
                assert len(set(names(held))) == value
                taken += names(held)
            elif kind == "give_back":
                source.give_back(held[:value])
                held = held[value:]
            else:
                source.report(dict.fromkeys(names(held), value))
        return taken, held

    source, again = new(), new()
    _, held = act(source, before, [])
    assert again.load_state_dict(json.loads(json.dumps(source.state_dict())))
    assert act(again, after, list(held)) == act(source, after, list(held))


def test_a_checkpoint_of_before_has_the_stream_alone():
    plain, source = stream(), PromptSource(stream())
    plain.take(5)
    assert source.load_state_dict(plain.state_dict())
    assert names(source.take(3)) == names(plain.take(3))
