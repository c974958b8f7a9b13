"""The prompts of a split: its sets read, made ready and checked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vespo_megatron.data.prepare import Job, first_beyond, first_problem, lengths, prepare
from vespo_megatron.data.prompt_set import PromptRecord, PromptSet, SeveralSets
from vespo_megatron.data.prompt_stream import PromptStream
from vespo_megatron.data.rows import Columns, too_long
from vespo_megatron.data.template import PromptTemplate, load_tokenizer
from vespo_megatron.errors import UserError
from vespo_megatron.recipe.model_shape import read_shape
from vespo_megatron.recipe.schema import DatasetConfig, Recipe, SetConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PromptRecord", "PromptStream", "SeveralSets", "load_prompts", "load_tokenizer"]


def load_prompts(dataset: DatasetConfig, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> SeveralSets:
    """Load, tokenise and check one split.

    Raises:
        UserError: no such file, an unknown format, a missing column, no rows, an empty or over-long prompt, a token
            id the model's vocabulary does not have.
    """
    template = PromptTemplate.of(recipe, tokenizer)
    return SeveralSets([_load(config, name, recipe, template) for name, config in dataset.given.items()])


def describe_set(config: SetConfig, name: str) -> str:
    """As errors name it."""
    place = ", ".join(config.places)
    return f"{name} ({place})" if name else place


def label_of(config: SetConfig, name: str) -> str:
    """What its prompt ids begin with: its name, or that of its only file or folder."""
    if name:
        return name
    place = Path(config.places[0])
    return place.name.split(".")[0] or place.stem or "prompts"


def prepared_set(config: SetConfig, name: str, recipe: Recipe, template: PromptTemplate) -> PromptSet:
    """All rows of a set that are taken, usable or not. Raises `UserError` as `prepare.prepare`."""
    where = describe_set(config, name)
    job = Job(Columns(config.columns, recipe.data.prompt_key, where), template)
    table, folder = prepare(config, job, seed=recipe.grpo.seed, num_workers=recipe.data.num_workers, where=where)
    return PromptSet(table, label_of(config, name), name=name, reward=config.reward_choice, cache=folder)


def _load(config: SetConfig, name: str, recipe: Recipe, template: PromptTemplate) -> PromptSet:
    where = describe_set(config, name)
    prompts = prepared_set(config, name, recipe, template)
    table = prompts.table
    if (bad := first_problem(table)) is not None:
        number, problem = bad
        raise UserError(problem, where=f"{where}, row {number}")
    limit, sizes = recipe.data.max_input_seq_length, lengths(table)
    positions = np.flatnonzero(sizes <= limit)
    if len(positions) < len(table) and recipe.data.on_long_prompt == "error":
        place = int(np.argmax(sizes > limit))
        raise too_long(int(sizes[place]), limit, f"{where}, row {table[place]['row']}")
    if not len(positions):
        raise UserError("every prompt is too long", where=where, expected=f"prompts of at most {limit} tokens")
    vocab_size = _vocab_size(recipe)
    if vocab_size is not None and (beyond := first_beyond(table, positions, vocab_size)) is not None:
        number, token = beyond
        raise UserError(
            f"the prompt has token id {token}",
            where=f"{where}, row {number}",
            expected=f"ids below the model's {vocab_size}",
            fix="the tokenizer is not this model's: check policy.tokenizer.name",
        )
    return prompts.at(positions)


def _vocab_size(recipe: Recipe) -> int | None:
    folder = Path(recipe.policy.model_name)
    return read_shape(folder).vocab_size if (folder / "config.json").is_file() else None
