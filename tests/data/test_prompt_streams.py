"""Several sets by weight, and sets read as they are needed: shares, epochs, and going on from any position."""

from __future__ import annotations

import json
import random

import pytest
from byte_tokenizer import byte_tokenizer
from listed_prompts import ListedPrompts
from scipy.stats import binomtest

from vespo_megatron.data.prepare import Job
from vespo_megatron.data.prompt_set import PromptRecord
from vespo_megatron.data.prompt_stream import PromptStream, WeightedStreams
from vespo_megatron.data.rows import Columns
from vespo_megatron.data.streaming import StreamedPrompts
from vespo_megatron.data.template import PromptTemplate
from vespo_megatron.errors import UserError
from vespo_megatron.recipe.schema import Recipe, SetConfig

SIZES = {"math": 90, "code": 40}
WEIGHTS = {"math": 3.0, "code": 1.0}


def weighted():
    streams = {
        name: PromptStream(ListedPrompts([PromptRecord(f"{name}/{i}", (1,), name, "") for i in range(size)]), seed=3)
        for name, size in SIZES.items()
    }
    return WeightedStreams(streams, WEIGHTS, seed=3)


def names(batches):
    return [record.prompt_id for batch in batches for record in batch]


def test_shares_are_those_of_the_weights_and_each_set_has_epochs_of_its_own():
    prompts = weighted()
    batches = [prompts.take(8) for _ in range(150)]
    assert all(len({record.prompt_id for record in batch}) == 8 for batch in batches)
    drawn = names(batches)
    of_math = [name for name in drawn if name.startswith("math/")]
    assert binomtest(len(of_math), len(drawn), 0.75).pvalue > 0.01
    for name, size in SIZES.items():
        mine = [each for each in drawn if each.startswith(f"{name}/")]
        for start in range(0, len(mine) - size + 1, size):
            # A batch that spans two epochs may take a prompt of the next one early, never twice.
            assert len(set(mine[start : start + size])) == size


def test_going_on_at_any_position_is_as_if_it_had_never_stopped():
    whole = weighted()
    wanted = names([whole.take(6) for _ in range(60)])
    chance = random.Random(0)
    found, prompts = [], weighted()
    stops = sorted(chance.sample(range(1, 60), 10))
    for number in range(60):
        if number in stops:
            state = json.loads(json.dumps(prompts.state_dict()))
            prompts = weighted()
            assert prompts.load_state_dict(state)
        found += names([prompts.take(6)])
    assert found == wanted


def test_other_sets_than_when_saved_are_named():
    state = weighted().state_dict()
    one = WeightedStreams({"math": weighted().streams["math"]}, {"math": 1.0}, seed=3)
    with pytest.raises(UserError, match=r"data\.train\.sets: has sets math\n  expected: code, math"):
        one.load_state_dict(state)


@pytest.fixture
def streamed(tmp_path):
    rows = [
        {"prompt": f"{number} + 1 =", "data_source": "sums", "reward_model": {"ground_truth": str(number + 1)}}
        for number in range(53)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:20]))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[20:]))

    def make(buffer=10, filters=(), **values):
        recipe = Recipe().with_values({"data.shuffle_buffer": buffer, "grpo.seed": 3, **values})
        config = SetConfig(path=str(tmp_path / "*.jsonl"), filter=list(filters))
        job = Job(Columns({}, "prompt", "sums"), PromptTemplate(byte_tokenizer()))
        return StreamedPrompts(config, job, recipe, name="", label="sums", where="sums")

    return make


def test_an_epoch_of_a_streamed_set_has_every_row_once_and_blocks_are_shuffled(streamed):
    prompts = streamed()
    drawn = names([prompts.take(1) for _ in range(106)])
    epochs = drawn[:53], drawn[53:]
    assert all(sorted(epoch) == sorted(f"sums/{n}" for n in range(53)) for epoch in epochs)
    assert epochs[0] != epochs[1] and sorted(epochs[0][:10]) == sorted(f"sums/{n}" for n in range(10)) != epochs[0][:10]
    assert streamed(**{"data.shuffle": False}).take(53)[7].prompt_id == "sums/7"


@pytest.mark.parametrize("stop", [1, 9, 10, 11, 25, 52, 53, 54, 70])
def test_a_streamed_set_goes_on_to_the_row(streamed, stop):
    whole, before, after = streamed(), streamed(), streamed()
    wanted = names([whole.take(1) for _ in range(110)])
    found = names([before.take(1) for _ in range(stop)])
    assert after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert found + names([after.take(1) for _ in range(110 - stop)]) == wanted


def test_streamed_rows_are_found_filtered_and_refused(streamed, tmp_path):
    prompts = streamed()
    assert prompts.find(["sums/31", "sums/2", "others/3"])["sums/31"].ground_truth == "32"
    assert set(prompts.find(["sums/31", "sums/2", "others/3"])) == {"sums/31", "sums/2"}
    few = streamed(filters=["prompt ~ ^4"])
    assert sorted(names([few.take(11)])) == sorted(f"sums/{n}" for n in (4, *range(40, 50)))
    with pytest.raises(UserError, match="num_prompts_per_step: is 12"):
        streamed(filters=["prompt ~ ^4"]).take(12)
    with pytest.raises(UserError, match="has no row that can be used"):
        streamed(filters=["prompt ~ nothing"]).take(1)
    with pytest.raises(UserError, match=r"row \d: the prompt has \d tokens"):
        streamed(**{"data.max_input_seq_length": 3}).take(1)
    state = streamed().state_dict()
    with pytest.raises(UserError, match="are others"):
        streamed(buffer=7).load_state_dict(state)
    assert not streamed(buffer=7, **{"data.on_change": "restart"}).load_state_dict(state)
