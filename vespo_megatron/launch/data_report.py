"""What a recipe's prompts are: one as the model sees it, and the numbers of every set."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from vespo_megatron.data.prepare import first_problem, lengths
from vespo_megatron.data.prompt_set import PromptSet, SeveralSets
from vespo_megatron.data.prompts import describe_set, label_of, load_prompts, prepared_set
from vespo_megatron.data.template import PromptTemplate, load_tokenizer
from vespo_megatron.errors import UserError
from vespo_megatron.launch.prompts import label_named, unscorable
from vespo_megatron.recipe.schema import DatasetConfig, Recipe, SetConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BARS = 40
"""Characters of the longest bar."""
_BINS = 8


def show(recipe: Recipe, row: int, name: str | None = None) -> str:
    """One prompt, special tokens and all, and what scores it.

    Args:
        row: its number in its file or set.
        name: of the set; None: the first of training.

    Raises:
        UserError: as `load_prompts`; no such set, or no such row in it.
    """
    tokenizer = load_tokenizer(recipe)
    prompts = _named(recipe, name, tokenizer)
    place = np.flatnonzero(prompts.numbers("row") == row)
    if not len(place):
        raise UserError(f"has no row {row}", where=label_named(prompts), expected="a row that is taken and used")
    record = prompts[int(place[0])]
    ids = list(record.prompt_ids)
    facts = {
        "prompt": record.prompt_id,
        "source": record.data_source,
        "reward": record.reward or "the recipe's",
        "ground truth": repr(record.ground_truth),
        "extra info": repr(record.extra_info),
        "tokens": str(len(ids)),
    }
    lines = [f"{fact:13} {value}" for fact, value in facts.items()]
    text = str(tokenizer.decode(ids, skip_special_tokens=False))
    return "\n".join([*lines, "", text, "", " ".join(map(str, ids))])


def _named(recipe: Recipe, name: str | None, tokenizer: PreTrainedTokenizerBase) -> PromptSet:
    known = []
    for split in (recipe.data.train, recipe.data.validation):
        for each, config in split.given.items():
            known.append(label_of(config, each))
            if name in (None, known[-1]):
                alone = DatasetConfig(sets={each: config}) if each else split
                return load_prompts(alone, recipe, tokenizer).sets[0]
    raise UserError(f"{name!r} is no set of the recipe", where="--set", expected=f"one of {', '.join(known)}")


def statistics(recipe: Recipe) -> str:
    """Of every set: rows, sources, lengths, what cannot be used or scored, duplicates; and what both splits have.

    Raises:
        UserError: as `prepared_set`. What would stop a run is counted here, not raised.
    """
    template = PromptTemplate.of(recipe, load_tokenizer(recipe))
    blocks, splits = [], {}
    for split, config in (("train", recipe.data.train), ("validation", recipe.data.validation)):
        sets = [prepared_set(each, name, recipe, template) for name, each in config.given.items()]
        splits[split] = SeveralSets(sets)
        blocks += [_of_set(split, prompts, config.given[prompts.name], recipe) for prompts in sets]
    return "\n\n".join([*blocks, *_common(splits["train"], splits["validation"])])


def _of_set(split: str, prompts: PromptSet, config: SetConfig, recipe: Recipe) -> str:
    where = describe_set(config, prompts.name)
    sizes, asked = lengths(prompts.table), prompts.numbers("asked")
    limit = recipe.data.max_input_seq_length
    sources = Counter(prompts.table["data_source"])
    lines = [f"{split}: {where}", f"  rows             {len(prompts)}"]
    lines += [f"  source           {name}: {count}" for name, count in sources.most_common(12)]
    if (bad := first_problem(prompts.table)) is not None:
        count = sum(problem != "" for problem in prompts.table["problem"])
        lines.append(f"  cannot be used   {count}, row {bad[0]} first: {bad[1].splitlines()[0]}")
    lines.append(
        f"  too long         {int((sizes > limit).sum())} of more than {limit} tokens (data.max_input_seq_length)"
    )
    try:
        reasons = unscorable(prompts, recipe.env, where)
        lines.append(f"  not scored       {len(reasons)} ground truths that the reward cannot read")
        for position, reason in list(reasons.items())[:3]:
            record = prompts[position]
            lines.append(f"                   {record.prompt_id}: {str(record.ground_truth)[:40]!r} {reason}")
    except UserError as error:
        lines.append(f"  not scored       {error.where}: {error.what}")
    lines.append(f"  duplicates       {len(asked) - len(np.unique(asked))} prompts that are there before")
    return "\n".join([*lines, *_histogram(sizes)])


def _histogram(sizes: np.ndarray) -> list[str]:
    counts, edges = np.histogram(sizes, bins=min(_BINS, max(1, int(np.ptp(sizes)))))
    middle = f"{np.median(sizes):.0f} in the middle"
    lines = [f"  prompt tokens    {sizes.min()} to {sizes.max()}, {middle}, {int(sizes.sum())} in all"]
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        bar = "█" * round(_BARS * count / counts.max())
        lines.append(f"    {int(np.ceil(low)):6} – {int(high):6}  {bar} {count}")
    return lines


def _common(train: SeveralSets, validation: SeveralSets) -> list[str]:
    known = np.concatenate([each.numbers("asked") for each in validation.sets] or [np.empty(0, dtype=np.int64)])
    lines = []
    for prompts in train.sets:
        both = np.isin(prompts.numbers("asked"), known)
        example = f", {prompts[int(np.argmax(both))].prompt_id} among them" if both.any() else ""
        lines.append(f"  {label_named(prompts)}: {int(both.sum())} of {len(prompts)}{example}")
    return (
        ["\n".join(["training prompts that are validation prompts too (data.on_contamination)", *lines])]
        if known.size
        else []
    )
