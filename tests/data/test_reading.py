"""Whatever a set is kept as: the same prompts in the same order as from the plain file; and what is refused."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma

import datasets
import pytest
import zstandard
from byte_tokenizer import byte_tokenizer, template
from model_config import write_config

from vespo_megatron.data.prompts import load_prompts
from vespo_megatron.errors import UserError
from vespo_megatron.recipe.schema import DatasetConfig, Recipe

ROWS = [
    {
        "prompt": [{"role": "user", "content": f"What is {number} + 1?"}],
        "data_source": "sums",
        "reward_model": {"ground_truth": str(number + 1)},
        "extra_info": {"index": number, "level": number % 5},
    }
    for number in range(130)
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.fixture
def load(tmp_path):
    write_config(tmp_path, vocab_size=512)

    def load(path, **settings):
        values = {"policy.model_name": str(tmp_path)} | settings.pop("recipe", {})
        config = DatasetConfig(path=path if isinstance(path, list) else str(path), **settings)
        return load_prompts(config, Recipe().with_values(values), byte_tokenizer(template("qwen3")))

    return load


def asked(records):
    return [(record.prompt_ids, record.data_source, record.ground_truth, record.extra_info) for record in records]


@pytest.fixture
def plain(load, tmp_path):
    (tmp_path / "plain.jsonl").write_text(LINES)
    return asked(load(tmp_path / "plain.jsonl"))


def kinds(folder):
    """Kind → (path, keys of the set)."""
    rows = datasets.Dataset.from_list(ROWS)
    parts = folder / "parts"
    parts.mkdir()
    for number, (start, end) in enumerate([(0, 50), (50, 51), (51, 130)]):
        rows.select(range(start, end)).to_parquet(parts / f"part_{number}.parquet")
    rows.to_parquet(folder / "rows.parquet")
    for suffix, kind in (("gz", gzip), ("bz2", bz2), ("xz", lzma)):
        with kind.open(folder / f"rows.jsonl.{suffix}", "wt") as file:
            file.write(LINES)
    (folder / "rows.jsonl.zst").write_bytes(zstandard.compress(LINES.encode()))
    (folder / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode())
    rows.save_to_disk(folder / "saved")
    datasets.DatasetDict({"train": rows.select(range(3)), "all": rows}).save_to_disk(folder / "splits")
    for name, change in (("content_parts", _with_parts), ("texts", _as_texts), ("others", _under_other_names)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(change(row)) + "\n" for row in ROWS))
    return {
        "parquet": (folder / "rows.parquet", {}),
        "folder of shards": (parts, {}),
        "pattern": (folder / "parts" / "part_*.parquet", {}),
        "several files": ([str(parts / f"part_{number}.parquet") for number in range(3)], {}),
        "gz": (folder / "rows.jsonl.gz", {}),
        "bz2": (folder / "rows.jsonl.bz2", {}),
        "xz": (folder / "rows.jsonl.xz", {}),
        "zst": (folder / "rows.jsonl.zst", {}),
        "byte-order mark and CRLF": (folder / "bom.jsonl", {}),
        "saved": (folder / "saved", {}),
        "saved with splits": (folder / "splits", {"split": "all"}),
        "content as parts": (folder / "content_parts.jsonl", {}),
        "columns as texts of JSON": (folder / "texts.jsonl", {}),
        "other columns": (
            folder / "others.jsonl",
            {"columns": {"prompt": "question", "ground_truth": "answer", "data_source": "=sums"}},
        ),
    }


def _with_parts(row):
    (message,) = row["prompt"]
    return row | {"prompt": [message | {"content": [{"type": "text", "text": message["content"]}]}]}


def _as_texts(row):
    return {name: value if name == "data_source" else json.dumps(value) for name, value in row.items()}


def _under_other_names(row):
    answer = row["reward_model"]["ground_truth"]
    return {"question": row["prompt"], "answer": answer, "extra_info": row["extra_info"]}


def test_every_kind_gives_the_plain_file_s_prompts_in_its_order(load, plain, tmp_path):
    (tmp_path / "sets").mkdir()
    for kind, (path, settings) in kinds(tmp_path / "sets").items():
        assert asked(load(path, **settings)) == plain, kind
    assert len(plain) == 130


def test_a_filter_takes_rows_by_number_choice_and_expression(load, tmp_path):
    (tmp_path / "plain.jsonl").write_text(LINES)

    def rows(*conditions):
        return [record.extra_info["index"] for record in load(tmp_path / "plain.jsonl", filter=list(conditions))]

    assert rows("extra_info.level >= 3") == [n for n in range(130) if n % 5 >= 3]
    assert rows("extra_info.level in 0|4", "extra_info.index < 10") == [0, 4, 5, 9]
    assert rows("extra_info.index ~ ^12[05]$") == [120, 125]
    assert rows("extra_info.level not in 0|1|2|3", "extra_info.index<=9") == [4, 9]
    assert rows("data_source == sums", "extra_info.nothing != 7", "extra_info.index == 3") == [3]


def test_samples_are_drawn_by_seed_and_are_not_the_first_ones(load, tmp_path):
    (tmp_path / "plain.jsonl").write_text(LINES)

    def rows(seed):
        records = load(tmp_path / "plain.jsonl", max_samples=20, recipe={"grpo.seed": seed})
        assert [record.prompt_id for record in records] == [f"plain/{r.extra_info['index']}" for r in records]
        return [record.extra_info["index"] for record in records]

    assert rows(1) == rows(1) == sorted(rows(1)) != list(range(20)) and rows(1) != rows(2)
    assert len(set(rows(1))) == 20


@pytest.mark.parametrize(
    ("path", "settings", "message"),
    [
        ("nowhere", {}, "is no dataset|does not exist"),
        ("empty", {}, "holds no data"),
        ("none_*.jsonl", {}, "no file is like that"),
        ("rows.jsonl", {"columns": {"question": "x"}}, r"columns: has 'question'\n  expected: some of prompt"),
        ("rows.jsonl", {"columns": {"prompt": "question"}}, "has no column 'question'"),
        ("rows.jsonl", {"filter": ["level"]}, "filter: has 'level'"),
        ("rows.jsonl", {"filter": ["level > 3"]}, r"filter: names 'level'\n  expected: one of .*extra_info"),
        ("rows.jsonl", {"filter": ["extra_info.level > 7"]}, "filter: takes no row"),
        ("rows.jsonl", {"filter": ["data_source ~ ("]}, "is no regular expression"),
        ("splits", {"split": "test"}, r"has no split 'test'\n  expected: one of train, all"),
        (["rows.jsonl", "others.jsonl"], {}, "other columns"),
    ],
)
def test_what_is_no_set_is_named(load, tmp_path, path, settings, message):
    (tmp_path / "rows.jsonl").write_text(LINES)
    (tmp_path / "others.jsonl").write_text(json.dumps({"prompt": 3, "data_source": ["x"], "reward_model": 7}) + "\n")
    (tmp_path / "empty").mkdir()
    rows = datasets.Dataset.from_list(ROWS[:4])
    datasets.DatasetDict({"train": rows, "all": rows}).save_to_disk(tmp_path / "splits")
    where = [str(tmp_path / each) for each in path] if isinstance(path, list) else tmp_path / path
    with pytest.raises(UserError, match=message):
        load(where, **settings)


def test_a_name_of_the_hub_without_a_network_is_one_clear_error(load, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="owner/name: is neither here nor on the hub .*\n.*\n.*without a network"):
        load("owner/name")


def test_a_large_set_is_made_ready_once_and_anew_when_anything_it_hangs_on_changes(load, tmp_path, monkeypatch):
    from vespo_megatron.data import prepare

    monkeypatch.setattr(prepare, "_LARGE", 100)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    made = []
    real = prepare.Job.__call__
    monkeypatch.setattr(prepare.Job, "__call__", lambda self, batch: made.append(len(batch)) or real(self, batch))
    (tmp_path / "plain.jsonl").write_text(LINES)
    alone = {"recipe": {"data.num_workers": 1}}
    first = asked(load(tmp_path / "plain.jsonl", **alone))
    assert made
    for settings in ({}, {"filter": ["extra_info.index >= 0"]}, {"max_samples": 129}):
        made.clear()
        load(tmp_path / "plain.jsonl", **settings, **alone)
        assert bool(made) == bool(settings), settings
    made.clear()
    kwargs = {"policy.tokenizer.chat_template_kwargs": {"enable_thinking": False}} | alone["recipe"]
    assert asked(load(tmp_path / "plain.jsonl", recipe=kwargs)) != first and made
    made.clear()
    (tmp_path / "plain.jsonl").write_text(LINES.replace("What is 7 ", "What is 8 "))
    assert asked(load(tmp_path / "plain.jsonl", **alone)) != first and made
    made.clear()
    monkeypatch.undo()
    monkeypatch.setattr(prepare, "_LARGE", 100)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "another")
    (tmp_path / "plain.jsonl").write_text(LINES)
    assert asked(load(tmp_path / "plain.jsonl", recipe={"data.num_workers": 2})) == first, "two processes"
    left = [entry.name for entry in (tmp_path / "another" / "vespo_megatron").iterdir()]
    assert len(left) == 1 and "partial" not in left[0]
