"""Arguments that several commands have."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from vespo_megatron.cli.numbers import number

if TYPE_CHECKING:
    from vespo_megatron.plan.timing import Lengths
    from vespo_megatron.recipe.schema import Recipe

_OVERRIDE = re.compile(r"[a-z_]+\.[^=\s]+=")


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """A recipe and its overrides."""
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as in grpo.seed=7")


def split_overrides(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides of a recipe, wherever they stand, and all other arguments.

    argparse takes them in one stretch only, and none after an option that may have several values. An override is told
    by the dot of its key: `aime24=32` is some option's own. What an option of one value is followed by is its value.
    """
    takes_one = options_of_one_value(parser)
    overrides: list[str] = []
    others: list[str] = []
    for before, text in pairwise(["", *arguments]):
        is_override = _OVERRIDE.match(text) and before not in takes_one
        (overrides if is_override else others).append(text)
    return overrides, others


def options_of_one_value(parser: argparse.ArgumentParser) -> set[str]:
    """As they are written, of any command."""
    found: set[str] = set()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found = found.union(*map(options_of_one_value, action.choices.values()))
        elif action.nargs is None:
            found.update(action.option_strings)
    return found


MOST_TOKENS = 1e9
"""Of a mean length: longer than anything that is trained, and short of what a float cannot multiply."""


def add_estimates(parser: argparse.ArgumentParser, *, gpu_required: bool) -> None:
    """What an estimate of a run needs besides its recipe."""
    tokens = number(1, MOST_TOKENS)
    parser.add_argument("--gpu", required=gpu_required, metavar="GPU", help="a100-80, h100-80, h200-141, h20-96, …")
    parser.add_argument("--prompt-tokens", type=tokens, metavar="N", help="mean length (default half of the longest)")
    parser.add_argument("--response-tokens", type=tokens, metavar="N", help="mean length (default half of the longest)")
    parser.add_argument(
        "--mfu", type=number(1e-3, 1), default=0.25, help="model FLOPs utilisation in training (default 0.25)"
    )


def mean_lengths(parsed: argparse.Namespace, recipe: Recipe) -> Lengths:
    """Mean lengths, as given or half of the longest."""
    from vespo_megatron.plan.timing import Lengths, default_lengths

    usual = default_lengths(recipe)
    return Lengths(parsed.prompt_tokens or usual.prompt, parsed.response_tokens or usual.response)
