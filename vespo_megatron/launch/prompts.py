"""Prompts that can be learned from: loaded, their ground truths read, training told apart from validation."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vespo_megatron.data.prepare import Job
from vespo_megatron.data.prompt_set import PromptRecord, PromptSet, SeveralSets
from vespo_megatron.data.prompt_stream import Prompts, PromptStream, WeightedStreams
from vespo_megatron.data.prompts import describe_set, label_of, load_prompts
from vespo_megatron.data.rows import Columns
from vespo_megatron.data.streaming import StreamedPrompts
from vespo_megatron.data.template import PromptTemplate
from vespo_megatron.errors import UserError
from vespo_megatron.recipe.schema import DatasetConfig, EnvConfig, Recipe
from vespo_megatron.rewards import functions
from vespo_megatron.rewards.ground_truths import unreadable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAMED = 3
"""Prompts that a message names."""


@dataclass(frozen=True)
class RunPrompts:
    """What a run trains on and is evaluated on, and what its log says of both."""

    train: Prompts
    validation: SeveralSets
    count: int | None
    """Training prompts; None where they are read as they are needed."""
    notes: list[str]


def load_run_prompts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> RunPrompts:
    """Both splits of a recipe. Raises `UserError` as `load_usable` and `apart`."""
    validation, notes = load_usable(recipe.data.validation, recipe, tokenizer)
    if recipe.data.train.streaming:
        train = stream_from_files(recipe, tokenizer)
        return RunPrompts(train, validation, None, [*notes, first_prompt(train.first(), tokenizer)])
    sets, more = load_usable(recipe.data.train, recipe, tokenizer)
    sets, both = apart(sets, validation, recipe)
    notes = [*notes, *more, *both]
    return RunPrompts(make_stream(sets, recipe), validation, len(sets), [*notes, first_prompt(sets[0], tokenizer)])


def load_usable(
    dataset: DatasetConfig, recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> tuple[SeveralSets, list[str]]:
    """The prompts of one split, and sentences on those that are left out.

    Raises:
        UserError: as `load_prompts`; ground truths that give no response a score, where `data.on_bad_ground_truth` is
            error or none would be left; a data source that `env.reward_by_source` has no pattern for.
    """
    usable, notes = [], []
    for prompts in load_prompts(dataset, recipe, tokenizer).sets:
        kept, note = _readable(prompts, recipe, describe_set(dataset.given[prompts.name], prompts.name))
        usable.append(kept)
        notes += [note] if note else []
    return SeveralSets(usable), notes


def _readable(prompts: PromptSet, recipe: Recipe, where: str) -> tuple[PromptSet, str]:
    reasons = unscorable(prompts, recipe.env, where)
    bad = [position for position in prompts.positions.tolist() if position in reasons]
    if not bad:
        return prompts, ""
    first = prompts.at(np.array(bad[:_NAMED]))
    named = "; ".join(
        f"{record.prompt_id}, {str(record.ground_truth)[:40]!r}, {reasons[position]}"
        for record, position in zip(first, bad, strict=False)
    )
    what = f"{len(bad)} of {len(prompts)} ground truths give no response a score: {named}"
    what += "; …" if len(bad) > _NAMED else ""
    if recipe.data.on_bad_ground_truth == "error" or len(bad) == len(prompts):
        asked = prompts.reward.partition(" ")[0] or " + ".join(sorted(functions.names_of(recipe.env)))
        raise UserError(
            what,
            where=where,
            expected=f"what env.reward={asked} reads",
            fix="mend them, or leave these prompts out: data.on_bad_ground_truth=drop",
        )
    return prompts.at(np.setdiff1d(prompts.positions, bad)), f"{where}: {what}"


def unscorable(prompts: PromptSet, env: EnvConfig, where: str) -> dict[int, str]:
    """Position in the table → why no response to it can score. Kept beside the table, where that is kept.

    Raises:
        UserError: a data source that `env.reward_by_source` has no pattern for.
    """
    keys = env.model_dump(include={"reward", "rewards", "reward_kwargs", "reward_by_source"})
    name = hashlib.blake2b(json.dumps([keys, prompts.reward], sort_keys=True).encode(), digest_size=8).hexdigest()
    file = prompts.cache / f"ground_truths.{name}.json" if prompts.cache else None
    if file is not None and file.is_file():
        return {int(position): reason for position, reason in json.loads(file.read_text()).items()}
    reasons: dict[int, str] = {}
    for judge, positions in _judges(prompts, env, where):
        truths = prompts.table.data.column("ground_truth").take(positions).combine_chunks().dictionary_encode()
        different = truths.dictionary.to_pylist()
        found = unreadable(judge, [json.loads(truth) for truth in different])
        if any(found):
            codes = truths.indices.to_numpy()
            bad = np.flatnonzero(np.array([reason is not None for reason in found])[codes])
            reasons |= {int(positions[place]): str(found[codes[place]]) for place in bad}
    if file is not None:
        partial = file.with_name(f"{file.name}.{os.getpid()}")
        partial.write_text(json.dumps(reasons))
        partial.replace(file)
    return reasons


def _judges(prompts: PromptSet, env: EnvConfig, where: str) -> Iterator[tuple[EnvConfig, np.ndarray]]:
    """Rewards as a recipe would have them, and the positions in the table that each scores."""
    everything = np.arange(len(prompts.table))
    if prompts.reward:
        reward, _, arguments = prompts.reward.partition(" ")
        yield EnvConfig(reward=reward, reward_kwargs=json.loads(arguments), timeout=env.timeout), everything
    elif not env.reward_by_source:
        yield env, everything
    else:
        sources = prompts.table.data.column("data_source").combine_chunks().dictionary_encode()
        patterns = [functions.pattern_of(env, source) for source in sources.dictionary.to_pylist()]
        if None in patterns:
            raise UserError(
                f"has no pattern that matches the data source {sources.dictionary[patterns.index(None)].as_py()!r}",
                where="env.reward_by_source",
                expected=f"one for every source of {where}",
                fix="add one; '*' matches all that is left",
            )
        codes = sources.indices.to_numpy()
        for pattern, choice in env.reward_by_source.items():
            mine = [code for code, other in enumerate(patterns) if other == pattern]
            positions = np.flatnonzero(np.isin(codes, mine))
            if len(positions):
                judge = EnvConfig(reward=choice.reward, reward_kwargs=choice.reward_kwargs, timeout=env.timeout)
                yield judge, positions


def apart(train: SeveralSets, validation: SeveralSets, recipe: Recipe) -> tuple[SeveralSets, list[str]]:
    """The training prompts without those that are validation prompts too, as `data.on_contamination` says.

    Raises:
        UserError: there are some, and that is an error; or none would be left.
    """
    asked = [each.numbers("asked") for each in validation.sets]
    known = np.concatenate(asked) if asked else np.empty(0, dtype=np.int64)
    kept, notes, on = [], [], recipe.data.on_contamination
    for prompts in train.sets:
        both = np.isin(prompts.numbers("asked"), known)
        kept.append(prompts.at(prompts.positions[~both]) if on == "drop" and both.any() else prompts)
        if not both.any():
            continue
        example = prompts[int(np.argmax(both))].prompt_id
        what = f"{both.sum()} of {len(prompts)} training prompts are validation prompts too, {example} among them"
        if on == "error" or not len(kept[-1]):
            raise UserError(
                what,
                where=label_named(prompts),
                expected="training prompts that no validation set has",
                fix="take them out, or set data.on_contamination: drop, keep",
            )
        notes.append(f"{label_named(prompts)}: {what}" + (": they are left out" if on == "drop" else ""))
    return SeveralSets(kept), notes


def label_named(prompts: PromptSet) -> str:
    """As sentences name a set."""
    return prompts.name or prompts.label


def make_stream(train: SeveralSets, recipe: Recipe) -> Prompts:
    """What a run draws its prompts from: one stream of all sets, or one of each by weight."""
    config, data = recipe.data.train, recipe.data
    options: dict[str, Any] = {"seed": recipe.grpo.seed, "shuffle": data.shuffle, "on_change": data.on_change}
    if all(each.weight is None for each in config.given.values()):
        places = ", ".join(describe_set(each, name) for name, each in config.given.items())
        return PromptStream(train, source=places, **options)
    streams = {
        each.name: PromptStream(SeveralSets([each]), source=describe_set(config.given[each.name], each.name), **options)
        for each in train.sets
    }
    return WeightedStreams(streams, weights(config), seed=recipe.grpo.seed)


def stream_from_files(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """As `make_stream`, of sets that are read as they are needed. Raises `UserError` as `StreamedPrompts`."""
    template, config = PromptTemplate.of(recipe, tokenizer), recipe.data.train
    streams: dict[str, Prompts] = {}
    for name, each in config.given.items():
        where = describe_set(each, name)
        job = Job(Columns(each.columns, recipe.data.prompt_key, where), template)
        streams[name] = StreamedPrompts(each, job, recipe, name=name, label=label_of(each, name), where=where)
    if len(streams) == 1:
        return next(iter(streams.values()))
    return WeightedStreams(streams, weights(config), seed=recipe.grpo.seed)


def weights(config: DatasetConfig) -> dict[str, float]:
    """Each set's; 1 where it has none."""
    return {name: each.weight or 1.0 for name, each in config.given.items()}


def first_prompt(record: PromptRecord, tokenizer: PreTrainedTokenizerBase) -> str:
    """As the model sees it, special tokens and all; in one line."""
    text = str(tokenizer.decode(list(record.prompt_ids), skip_special_tokens=False))
    return f"the first prompt, {record.prompt_id}, {len(record.prompt_ids)} tokens: {text!r}"
