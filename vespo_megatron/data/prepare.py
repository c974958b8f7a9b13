"""A set's rows made ready once: chosen, tokenised, told apart, and kept on the disk for the next start.

The table has a line per row: `row` int64 (its number in the set), `prompt_ids` list of int32, `data_source`,
`ground_truth` and `extra_info` as JSON, `asked` and `content` int64 (of the token ids alone, and of everything), and
`problem` (why it cannot be used, empty where it can). It is kept beside the cache of Hugging Face's datasets, under a
name made of all that it hangs on: files, tokenizer, template, and the recipe's keys of the set.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vespo_megatron.data import rows as schema
from vespo_megatron.data.reading import read
from vespo_megatron.data.template import PromptTemplate
from vespo_megatron.errors import UserError
from vespo_megatron.recipe.schema import SetConfig

if TYPE_CHECKING:
    import datasets

_FORM = "1"
"""Another one for every change of what the table holds."""
_LARGE = 5000
"""Rows from which a table is kept, and made by several processes."""


@dataclass(frozen=True)
class Job:
    """What becomes of a row."""

    columns: schema.Columns
    template: PromptTemplate

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Some rows' columns → the table's, but for `row`."""
        count = len(next(iter(batch.values())))
        prompts: list[Any] = []
        tools: list[Any] = []
        found = []
        for number in range(count):
            row = {name: values[number] for name, values in batch.items()}
            each = {"data_source": "", "ground_truth": "null", "extra_info": "{}", "problem": ""}
            try:
                prompts.append(schema.prompt(self.columns.of(row, "prompt"), self.template.system))
                tools.append(schema.tools(self.columns.of(row, "tools")))
                each["data_source"] = str(self.columns.of(row, "data_source"))
                each["ground_truth"] = _json(schema.ground_truth(self.columns, row))
                each["extra_info"] = _json(schema.mapping(self.columns.of(row, "extra_info"), "extra_info"))
            except UserError as error:
                del prompts[number:], tools[number:]
                prompts.append(None)
                tools.append(None)
                each["problem"] = _problem(error)
            found.append(each)
        ids = self._ids(prompts, tools, found)
        table: dict[str, list[Any]] = {name: [each[name] for each in found] for name in found[0]}
        texts = zip(table["data_source"], table["ground_truth"], table["extra_info"], strict=True)
        asked = [_number(np.asarray(each, dtype=np.int32).tobytes()) for each in ids]
        whole = [f"{number}{row!r}".encode(errors="backslashreplace") for number, row in zip(asked, texts, strict=True)]
        content = [_number(each) for each in whole]
        return {"prompt_ids": ids, **table, "asked": asked, "content": content}

    def _ids(self, prompts: list[Any], tools: list[Any], found: list[dict[str, str]]) -> list[list[int]]:
        good = [number for number, prompt in enumerate(prompts) if prompt is not None]
        ids: list[list[int]] = [[] for _ in prompts]
        try:
            many = self.template.ids([prompts[number] for number in good], [tools[number] for number in good])
        except Exception:  # some row's: each alone then, so that it is known whose
            many = [self._one(prompts[number], tools[number], found[number]) for number in good]
        for number, each in zip(good, many, strict=True):
            ids[number] = each
            if not each and not found[number]["problem"]:
                found[number]["problem"] = "the prompt is empty\n  expected: at least one token"
        return ids

    def _one(self, prompt: Any, tools: Any, found: dict[str, str]) -> list[int]:
        try:
            return self.template.one(prompt, tools)
        except UserError as error:
            found["problem"] = _problem(error)
            return []


def prepare(
    config: SetConfig, job: Job, *, seed: int, num_workers: int, where: str
) -> tuple[datasets.Dataset, Path | None]:
    """The table of a set, and the folder that it is kept in, if it is.

    Raises:
        UserError: as `reading.read`; a column or filter that is not there, or no row that is taken.
    """
    import datasets

    raw = read(config, where)
    job.columns.check(raw.column_names, where)
    folder = _folder(raw, config, job, seed)
    if folder is not None and folder.is_dir():
        return datasets.load_from_disk(str(folder)), folder
    numbers = _chosen(raw, config, seed, where)
    wanted = raw.select_columns(job.columns.used(raw.column_names))
    if len(numbers) < len(raw):
        wanted = wanted.select(numbers)
    table = wanted.map(
        job,
        batched=True,
        remove_columns=wanted.column_names,
        num_proc=num_workers if len(wanted) >= _LARGE and num_workers > 1 else None,
        features=_features(),
        new_fingerprint=folder.name if folder else os.urandom(8).hex(),
        load_from_cache_file=False,
        keep_in_memory=folder is None,
    )
    table = table.add_column("row", numbers)
    return (table, None) if folder is None else (_keep(table, folder), folder)


def _features() -> datasets.Features:
    from datasets import Features, List, Value

    texts = dict.fromkeys(("data_source", "ground_truth", "extra_info", "problem"), Value("string"))
    return Features({"prompt_ids": List(Value("int32")), **texts, "asked": Value("int64"), "content": Value("int64")})


def _folder(raw: datasets.Dataset, config: SetConfig, job: Job, seed: int) -> Path | None:
    import datasets

    tokenizer = job.template.fingerprint
    if tokenizer is None or len(raw) < _LARGE:
        return None
    keys = config.model_dump(include={"columns", "filter", "max_samples"})
    facts = [_FORM, raw._fingerprint, tokenizer, seed if config.max_samples else None, keys, job.columns.names]
    name = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()
    return Path(datasets.config.HF_DATASETS_CACHE) / "vespo_megatron" / name


def _keep(table: datasets.Dataset, folder: Path) -> datasets.Dataset:
    """Written under another name and renamed: it is there whole, or not at all."""
    import datasets

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial.", dir=folder.parent))
    try:
        table.save_to_disk(str(partial))
        for left in table.cache_files:  # what `map` wrote to make it
            Path(left["filename"]).unlink(missing_ok=True)
        try:
            partial.rename(folder)
        except OSError:  # another process was first
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return datasets.load_from_disk(str(folder))


def _chosen(raw: datasets.Dataset, config: SetConfig, seed: int, where: str) -> np.ndarray:
    """int64, the numbers of the rows that are taken, in order."""
    numbers = np.arange(len(raw), dtype=np.int64)
    filters = [schema.Filter.of(text, f"{where}: filter") for text in config.filter]
    if filters:
        used = sorted({each.column.split(".")[0] for each in filters})
        if missing := [name for name in used if name not in raw.column_names]:
            raise UserError(
                f"names {missing[0]!r}", where=f"{where}: filter", expected=f"one of {', '.join(raw.column_names)}"
            )
        taken = [all(each.takes(row) for each in filters) for row in raw.select_columns(used)]
        numbers = numbers[np.array(taken, dtype=bool)]
        if not len(numbers):
            raise UserError("takes no row", where=f"{where}: filter", expected="conditions that some row fulfils")
    if config.max_samples is not None and config.max_samples < len(numbers):
        drawn = random.Random(f"{seed}/samples").sample(range(len(numbers)), config.max_samples)
        numbers = numbers[np.sort(np.array(drawn))]
    return numbers


def _json(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)


def _number(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def _problem(error: UserError) -> str:
    """Without a place: its row is known where it is told."""
    return str(UserError(error.what, expected=error.expected, fix=error.fix))


def first_problem(table: datasets.Dataset) -> tuple[int, str] | None:
    """The first row that cannot be used, by its number, and why."""
    import pyarrow.compute as pc

    problems = table.data.column("problem")
    place = pc.index(pc.not_equal(problems, ""), True).as_py()
    return None if place < 0 else (int(table.data.column("row")[place].as_py()), problems[place].as_py())


def lengths(table: datasets.Dataset) -> np.ndarray:
    """int32 [N], tokens of each prompt."""
    import pyarrow.compute as pc

    return pc.list_value_length(table.data.column("prompt_ids")).to_numpy()


def first_beyond(table: datasets.Dataset, positions: Sequence[int] | np.ndarray, size: int) -> tuple[int, int] | None:
    """Of those rows the first that has a token id of a vocabulary larger than `size`: its number and the id."""
    import pyarrow.compute as pc

    column = table.data.column("prompt_ids")
    if max((pc.max(chunk.flatten()).as_py() or 0 for chunk in column.chunks), default=0) < size:
        return None
    for position in positions:
        ids = column[int(position)].as_py()
        if max(ids, default=0) >= size:
            return int(table.data.column("row")[int(position)].as_py()), max(ids)
    return None
