"""`vespo-megatron plan`: memory and time of a recipe on a GPU."""

from __future__ import annotations

import argparse

from vespo_megatron.cli.numbers import whole_number
from vespo_megatron.cli.shared import add_estimates, add_recipe, mean_lengths

HELP = "memory and time of a recipe on a GPU, and what fits if it does not"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_recipe(parser)
    add_estimates(parser, gpu_required=True)
    parser.add_argument(
        "--compare", type=whole_number(0), default=8, metavar="N", help="layouts to show beside it (default 8)"
    )


def run(parsed: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    from vespo_megatron.megatron.hardware import gpu
    from vespo_megatron.plan import planner
    from vespo_megatron.plan.published import shape_of
    from vespo_megatron.recipe.loader import load_recipe

    recipe = load_recipe(parsed.recipe, parsed.overrides)
    device, shape, lengths = gpu(parsed.gpu), shape_of(recipe.policy.model_name), mean_lengths(parsed, recipe)
    made = planner.plan(shape, recipe, device, lengths, parsed.mfu)
    print(planner.report(shape, made, lengths, mfu=parsed.mfu, compare=parsed.compare))
    return 0 if made.fits else 3
