"""Prompts: parquet or JSONL in veRL's schema, tokenised and checked; and the stream a run draws from.

The schema (https://verl.readthedocs.io/en/latest/preparation/prepare_data.html): `prompt` (chat messages or text),
`data_source`, `reward_model.ground_truth`, optionally `extra_info` (with `index`).
"""

from __future__ import annotations

import contextlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vespo_megatron.data.fingerprint import fingerprint
from vespo_megatron.errors import UserError
from vespo_megatron.recipe.model_shape import read_shape
from vespo_megatron.recipe.schema import DatasetConfig, Recipe

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

_LIKE_MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"](?:role|content)['"]\s*:""")
_LOADERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}


@dataclass(frozen=True)
class PromptRecord:
    """One prompt, ready to send."""

    prompt_id: str
    """Its place in the file: 'train/17'."""
    prompt_ids: tuple[int, ...]
    data_source: str
    ground_truth: Any
    extra_info: dict[str, Any] = field(default_factory=dict)


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer of the recipe, or its model's. Raises UserError when there is none in that folder."""
    from transformers import AutoTokenizer

    name = recipe.policy.tokenizer.name or recipe.policy.model_name
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"no tokenizer ({str(error).splitlines()[0]})", where=f"policy.tokenizer.name: {name}", expected="a folder"
        ) from None


def load_prompts(dataset: DatasetConfig, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[PromptRecord]:
    """Load, tokenise and check one split.

    Raises:
        UserError: no such file, an unknown format, a missing column, no rows, an empty or over-long prompt, a token
            id the model's vocabulary does not have.
    """
    path = Path(dataset.path or "")
    rows = _read(path)
    key = recipe.data.prompt_key
    for column in (key, "data_source", "reward_model"):
        if column not in rows.column_names:
            raise UserError(
                f"has no column {column!r}",
                where=str(path),
                expected=f"veRL's schema; found {rows.column_names}",
                fix="rename the column" + (", or set data.prompt_key" if column == key else ""),
            )
    if dataset.max_samples is not None:
        rows = rows.select(range(min(dataset.max_samples, len(rows))))
    if len(rows) == 0:
        raise UserError("has no rows", where=str(path), expected="at least one prompt")
    limit = recipe.data.max_input_seq_length
    vocab_size = _vocab_size(recipe)
    records = []
    for number, row in enumerate(rows):
        where = f"{path}, row {number}"
        ids = _tokenise(row[key], tokenizer, recipe.policy.tokenizer.chat_template, where)
        if len(ids) > limit:
            if recipe.data.on_long_prompt == "drop":
                continue
            raise UserError(
                f"the prompt has {len(ids)} tokens",
                where=where,
                expected=f"at most {limit}, data.max_input_seq_length",
                fix="raise the limit (and policy.max_total_sequence_length), or set data.on_long_prompt=drop",
            )
        if vocab_size is not None and max(ids) >= vocab_size:
            raise UserError(
                f"the prompt has token id {max(ids)}",
                where=where,
                expected=f"ids below the model's {vocab_size}",
                fix="the tokenizer is not this model's: check policy.tokenizer.name",
            )
        extra, truth = _mapping(row, "extra_info", where), _ground_truth(row, where)
        records.append(PromptRecord(f"{path.stem}/{number}", tuple(ids), row["data_source"], truth, extra))
    if not records:
        raise UserError("every prompt is too long", where=str(path), expected=f"prompts of at most {limit} tokens")
    return records


def _read(path: Path) -> datasets.Dataset:
    import datasets

    if path.suffix not in _LOADERS:
        raise UserError(f"{path.name!r} is no dataset", where="data", expected="a .parquet, .jsonl or .json file")
    if not path.is_file():
        raise UserError("does not exist", where=str(path), expected="a dataset file", fix="check the data section")
    if _is_empty(path):  # datasets' own words for it name neither the file nor the matter
        raise UserError("has no rows", where=str(path), expected="at least one prompt")
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(_LOADERS[path.suffix], data_files=str(path), split="train")
    except Exception as error:  # datasets wraps every parser's own exceptions
        cause = error.__cause__ or error
        if (elsewhere := _outside(path, error)) is not None:
            raise elsewhere from None
        expected = f"a {path.suffix} file with rows"
        raise UserError(f"cannot be read ({cause})", where=str(path), expected=expected) from None


def _outside(path: Path, error: BaseException | None) -> UserError | None:
    """What `datasets` met in its cache, which is no fault of the data."""
    while error is not None:
        if isinstance(error, OSError) and error.filename and Path(str(error.filename)) != path:
            return UserError(
                f"cannot be written ({error.strerror})",
                where=f"the cache of Hugging Face's datasets, {error.filename}",
                fix="set HF_HOME or HF_DATASETS_CACHE to a folder that this user can write",
            )
        error = error.__cause__ or error.__context__
    return None


def _is_empty(path: Path) -> bool:
    """Whether there is surely no row in it; a damaged file is left to the parser's own message."""
    if path.suffix != ".parquet":
        with path.open("rb") as file:
            return not any(line.strip() for line in file)
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_metadata(path).num_rows == 0
    except (pyarrow.ArrowException, OSError):
        return False


def _tokenise(prompt: Any, tokenizer: PreTrainedTokenizerBase, chat_template: bool, where: str) -> list[int]:
    prompt = _messages(prompt, where)
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    elif isinstance(prompt, Sequence) and prompt and all(_is_message(part) for part in prompt):
        ids = _ids_of_messages(prompt, tokenizer, chat_template, where)
    else:
        raise UserError(f"the prompt is {prompt!r}", where=where, expected="text, or a list of {role, content}")
    if not ids:
        raise UserError("the prompt is empty", where=where, expected="at least one token")
    return list(ids)


def _ids_of_messages(
    messages: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, chat_template: bool, where: str
) -> Sequence[int]:
    if not (chat_template and tokenizer.chat_template):
        contents = [part["content"] for part in messages]
        if not all(isinstance(content, str) for content in contents):
            raise UserError(f"the prompt is {messages!r}", where=where, expected="text as every message's content")
        return tokenizer("\n".join(contents))["input_ids"]
    try:
        ids: Any = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return [int(token) for token in ids]
    except Exception as error:  # a template is a program: it may raise anything
        raise UserError(
            f"the tokenizer's chat template does not take the prompt ({type(error).__name__}: {error})",
            where=where,
            expected="messages with the roles and contents that the template knows",
            fix="mend the data, or set policy.tokenizer.chat_template=false: contents alone, line by line",
        ) from None


def _messages(prompt: Any, where: str) -> Any:
    """Messages that are a text of JSON, as parquet written by pandas often has them; any other prompt as it is.

    Raises:
        UserError: messages as Python prints them, which is no JSON and no prompt either.
    """
    if not isinstance(prompt, str) or not _LIKE_MESSAGES.match(prompt):
        return prompt
    try:
        return json.loads(prompt)
    except json.JSONDecodeError:
        raise UserError(
            f"the prompt {prompt[:40]!r} looks like messages and is no JSON",
            where=where,
            expected="text, a list of {role, content}, or JSON of one",
            fix="write the column with json.dumps, not with str",
        ) from None


def _mapping(row: dict[str, Any], column: str, where: str) -> dict[str, Any]:
    """A column that holds a mapping, or JSON of one; empty where it holds nothing. Raises UserError."""
    value = row.get(column) or {}
    if isinstance(value, str):
        with contextlib.suppress(json.JSONDecodeError):
            value = json.loads(value)
    if not isinstance(value, dict):
        raise UserError(f"{column} is {row[column]!r}", where=where, expected="a mapping, or JSON of one")
    return value


def _is_message(part: Any) -> bool:
    return isinstance(part, dict) and "content" in part


def _ground_truth(row: dict[str, Any], where: str) -> Any:
    reward_model = _mapping(row, "reward_model", where)
    if "ground_truth" not in reward_model:
        raise UserError(f"reward_model is {reward_model!r}", where=where, expected="a mapping with ground_truth")
    return reward_model["ground_truth"]


def _vocab_size(recipe: Recipe) -> int | None:
    folder = Path(recipe.policy.model_name)
    return read_shape(folder).vocab_size if (folder / "config.json").is_file() else None


class PromptStream:
    """Prompts without end: epoch after epoch, shuffled by (seed, epoch) alone, from a position that can be saved.

    Args:
        source: where the records are from, for messages.
        on_change: what a position in other records leads to: an "error", or to "restart" in these.
    """

    def __init__(
        self,
        records: Sequence[PromptRecord],
        *,
        seed: int,
        shuffle: bool = True,
        source: str = "",
        on_change: Literal["error", "restart"] = "error",
    ) -> None:
        self.records, self.seed, self.shuffle = records, seed, shuffle
        self.source, self.on_change = source, on_change
        self.epoch = self.position = 0
        self._order = self._shuffled(0)

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self.records)))
        if self.shuffle:
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return order

    def take(self, count: int) -> list[PromptRecord]:
        """The next `count` prompts, no prompt twice in one call.

        Raises:
            UserError: more are asked for than there are.
        """
        if count > len(self.records):
            raise UserError(
                f"is {count}",
                where="grpo.num_prompts_per_step",
                expected=f"at most the {len(self.records)} training prompts",
            )
        taken: list[PromptRecord] = []
        names: set[str] = set()
        while len(taken) < count:
            if self.position == len(self._order):
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._shuffled(self.epoch)
                # A batch that spans two epochs must not hold a prompt twice: those it has go to the end.
                self._order.sort(key=lambda index: self.records[index].prompt_id in names)
            record = self.records[self._order[self.position]]
            self.position += 1
            taken.append(record)
            names.add(record.prompt_id)
        return taken

    @cached_property
    def fingerprint(self) -> str:
        """Of the records, in the order of the file."""
        return fingerprint(self.records)

    def state_dict(self) -> dict[str, Any]:
        """Position and order, and in what, for a checkpoint."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "order": list(self._order),
            "count": len(self.records),
            "source": self.source,
            "fingerprint": self.fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Continue where `state` was taken; False where that was in other records, and these are begun instead.

        Raises:
            UserError: they are others, and `on_change` is "error". Checkpoints of before fingerprints tell by number.
        """
        count, known = state["count"], state.get("fingerprint", self.fingerprint)
        if (count, known) == (len(self.records), self.fingerprint):
            self.epoch, self.position, self._order = state["epoch"], state["position"], list(state["order"])
            return True
        if self.on_change == "restart":
            return False
        raise UserError(
            f"holds {len(self.records)} prompts, fingerprint {self.fingerprint}, of {self.source or 'other data'}",
            where="data.train",
            expected=f"{count} prompts, fingerprint {known}, of {state.get('source') or 'its data'}, as when saved",
            fix="give it the data (and tokenizer) it had, or set data.on_change=restart to begin these prompts anew",
        )
