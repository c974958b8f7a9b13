"""Prompts that can be learned from: loaded, and their ground truths read by the recipe's reward."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vespo_megatron.data.prompts import PromptRecord, load_prompts
from vespo_megatron.errors import UserError
from vespo_megatron.recipe.schema import DatasetConfig, Recipe
from vespo_megatron.rewards.ground_truths import unreadable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAMED = 3
"""Prompts that a message names."""


def load_usable(
    dataset: DatasetConfig, recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[PromptRecord], str]:
    """The prompts of one split, and a sentence on those that are left out, empty where none is.

    Raises:
        UserError: as `load_prompts`; or ground truths that give no response a score, where `data.on_bad_ground_truth`
            is error or none would be left.
    """
    records = load_prompts(dataset, recipe, tokenizer)
    reasons = unreadable(recipe.env, [record.ground_truth for record in records])
    bad = [(record, reason) for record, reason in zip(records, reasons, strict=True) if reason]
    if not bad:
        return records, ""
    named = "; ".join(f"{record.prompt_id}, {str(record.ground_truth)[:40]!r}, {why}" for record, why in bad[:_NAMED])
    what = f"{len(bad)} of {len(records)} ground truths give no response a score: {named}"
    what += "; …" if len(bad) > _NAMED else ""
    if recipe.data.on_bad_ground_truth == "error" or len(bad) == len(records):
        raise UserError(
            what,
            where=str(dataset.path),
            expected=f"what env.reward={' + '.join(recipe.env.rewards) or recipe.env.reward} reads",
            fix="mend them, or leave these prompts out: data.on_bad_ground_truth=drop",
        )
    return [record for record, reason in zip(records, reasons, strict=True) if not reason], f"{dataset.path}: {what}"
