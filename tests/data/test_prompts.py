"""Loading prompts in veRL's schema, what is refused, and the stream."""

from __future__ import annotations

import json

import pytest
from listed_prompts import ListedPrompts
from model_config import write_config

from vespo_megatron.data.prompt_set import PromptRecord
from vespo_megatron.data.prompt_stream import PromptStream
from vespo_megatron.data.prompts import load_prompts
from vespo_megatron.errors import UserError
from vespo_megatron.recipe.schema import DatasetConfig, Recipe


class LetterTokenizer:
    """One id per letter; a chat is its contents between brackets."""

    chat_template = "yes"

    def __call__(self, text):
        return {"input_ids": [ord(letter) for letter in text]}

    def apply_chat_template(self, messages, **kwargs):
        return self("[" + "".join(message["content"] for message in messages) + "]")["input_ids"]


def row(prompt="2+2=", **changes):
    return {"prompt": prompt, "data_source": "sums", "reward_model": {"ground_truth": "4"}} | changes


@pytest.fixture
def load(tmp_path):
    def load(rows, **settings):
        path = tmp_path / "train.jsonl"
        path.write_text("".join(json.dumps(each) + "\n" for each in rows))
        write_config(tmp_path, vocab_size=settings.pop("vocab_size", 128))
        values = {f"data.{name}": value for name, value in settings.items()}
        recipe = Recipe().with_values({"policy.model_name": str(tmp_path)} | values)
        return load_prompts(DatasetConfig(path=str(path)), recipe, LetterTokenizer())

    return load


def test_text_and_chat_prompts_load_as_they_are(load):
    text, chat = (
        load([row(), row([{"role": "user", "content": "hi"}])])[0],
        load([row([{"role": "user", "content": "hi"}])])[0],
    )
    assert bytes(text.prompt_ids) == b"2+2=" and text.ground_truth == "4" and text.prompt_id == "train/0"
    assert bytes(chat.prompt_ids) == b"[hi]"


def test_columns_that_are_texts_of_json_are_read_as_what_they_hold(load):
    chat = [{"role": "user", "content": "hi"}]
    truth, extra = {"ground_truth": "5"}, {"index": 7}
    (record,) = load([row(json.dumps(chat), reward_model=json.dumps(truth), extra_info=json.dumps(extra))])
    assert bytes(record.prompt_ids) == b"[hi]" and record.ground_truth == "5" and record.extra_info == extra


def test_a_text_that_happens_to_be_json_stays_a_text(load):
    texts = ['{"role": "user"}', "[1, 2]", '[{"a": 1}]', "[hi]"]
    assert [bytes(record.prompt_ids).decode() for record in load([row(text) for text in texts])] == texts


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"prompt": "x", "data_source": "s"}], {}, "has no column 'reward_model'"),
        ([row()], {"prompt_key": "question"}, "has no column 'question'"),
        ([row("x" * 50)], {"max_input_seq_length": 40}, "row 0: the prompt has 50 tokens"),
        ([row(), row("z")], {"vocab_size": 100}, "row 1: the prompt has token id 122"),
        ([row("")], {}, "row 0: the prompt is empty"),
        ([row(reward_model={"style": "rule"})], {}, "expected: a mapping with ground_truth"),
        ([row(reward_model="4")], {}, "row 0: reward_model is '4'"),
        ([row(extra_info="none")], {}, "row 0: extra_info is 'none'"),
        ([row(str([{"role": "user", "content": "hi"}]))], {}, "row 0: the prompt .* is no JSON"),
        ([], {}, "train.jsonl: has no rows"),
    ],
)
def test_what_cannot_be_used_is_named(load, rows, settings, message):
    with pytest.raises(UserError, match=message):
        load(rows, **settings)


@pytest.mark.filterwarnings("error")
def test_a_parquet_file_of_no_rows_has_its_own_message_and_no_other(tmp_path, capfd):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "train.parquet"
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), path)
    with pytest.raises(UserError, match=r"train\.parquet: has no rows"):
        load_prompts(DatasetConfig(path=str(path)), Recipe(), LetterTokenizer())
    assert capfd.readouterr() == ("", "")


def test_a_damaged_parquet_file_is_named(tmp_path):
    path = tmp_path / "train.parquet"
    path.write_bytes(b"PAR1 but no more")
    with pytest.raises(UserError, match=r"train\.parquet: cannot be read"):
        load_prompts(DatasetConfig(path=str(path)), Recipe(), LetterTokenizer())


def test_long_prompts_can_be_dropped(load):
    records = load([row("x" * 50), row()], max_input_seq_length=40, on_long_prompt="drop")
    assert [record.prompt_id for record in records] == ["train/1"]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.parquet: does not exist"):
        load_prompts(DatasetConfig(path=str(tmp_path / "nowhere.parquet")), Recipe(), LetterTokenizer())


def stream(count=10, **settings):
    records = ListedPrompts([PromptRecord(f"p{i}", (1,), "s", "") for i in range(count)])
    return PromptStream(records, seed=3, **settings)


def test_an_epoch_holds_every_prompt_once_and_no_batch_a_prompt_twice():
    prompts = stream()
    batches = [[record.prompt_id for record in prompts.take(4)] for _ in range(10)]
    assert all(len(set(batch)) == 4 for batch in batches)
    flat = [name for batch in batches for name in batch]
    assert all(flat.count(f"p{i}") == 4 for i in range(10))


def test_a_stream_continues_from_its_saved_state():
    original, resumed = stream(), stream()
    original.take(7)
    resumed.load_state_dict(json.loads(json.dumps(original.state_dict())))
    assert [original.take(4) for _ in range(5)] == [resumed.take(4) for _ in range(5)]


def changed(record=None, **settings):
    """A stream like any other, but for one row."""
    records = ListedPrompts(stream().records)
    records[3] = record or PromptRecord("p3", (1,), "s", "other")
    return PromptStream(records, seed=3, source="new.jsonl", **settings)


@pytest.mark.parametrize(
    "row",
    [
        PromptRecord("p3", (2,), "s", ""),
        PromptRecord("p3", (1,), "t", ""),
        PromptRecord("p3", (1,), "s", "4"),
        PromptRecord("p3", (1,), "s", "", {"tests": "[]"}),
    ],
    ids=["prompt", "data source", "ground truth", "extra info"],
)
def test_a_position_in_other_data_of_as_many_rows_names_both(row):
    original = stream(source="old.jsonl")
    original.take(7)
    with pytest.raises(UserError, match="data.train: holds 10 prompts, fingerprint") as caught:
        changed(row).load_state_dict(json.loads(json.dumps(original.state_dict())))
    for part in ("old.jsonl", "new.jsonl", original.fingerprint, changed(row).fingerprint, "data.on_change"):
        assert part in str(caught.value)


def test_other_data_is_begun_anew_where_the_recipe_says_so():
    original, resumed = stream(), changed(on_change="restart")
    original.take(7)
    assert not resumed.load_state_dict(original.state_dict())
    assert resumed.take(10) == changed().take(10)
    assert stream(on_change="restart").load_state_dict(original.state_dict())


def test_a_checkpoint_without_a_fingerprint_tells_data_by_number():
    state = {"epoch": 0, "position": 2, "order": list(range(10)), "count": 10}
    assert changed().load_state_dict(state)
    with pytest.raises(UserError, match="holds 9 prompts"):
        stream(9).load_state_dict(state)


def test_more_prompts_than_there_are_is_an_error():
    with pytest.raises(UserError, match="grpo.num_prompts_per_step: is 11"):
        stream().take(11)


@pytest.mark.parametrize("error", [TypeError("can only concatenate str"), RuntimeError("roles must alternate")])
def test_a_chat_template_that_fails_names_row_and_reason(load, monkeypatch, error):
    def fail(self, messages, **kwargs):
        raise error

    monkeypatch.setattr(LetterTokenizer, "apply_chat_template", fail)
    with pytest.raises(UserError, match=rf"train\.jsonl, row 0: the tokenizer's chat template.*{error}"):
        load([row([{"role": "user", "content": "hi"}])])


@pytest.mark.parametrize("content", [None, 3])
def test_without_a_template_a_message_s_content_is_text(load, monkeypatch, content):
    monkeypatch.setattr(LetterTokenizer, "chat_template", None)
    with pytest.raises(UserError, match="row 0: a message is .*\n.*text, or parts of text, as every message's content"):
        load([row([{"role": "user", "content": content}])])


def test_a_cache_that_cannot_be_written_is_not_blamed_on_the_data(load, tmp_path, monkeypatch):
    """As in a home directory that is read-only; a file in a folder's place stops root as well."""
    import datasets

    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    with pytest.raises(UserError, match="the cache of Hugging Face's datasets, .*file.*\n  to do: set HF_HOME"):
        load([row()])
