"""`vespo-megatron eval`: score a checkpoint or a served model."""

from __future__ import annotations

import argparse

from vespo_megatron.cli.shared import add_recipe

HELP = "score a checkpoint or a served model: avg@k, pass@k, maj@k"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_recipe(parser)
    parser.add_argument("--checkpoint", metavar="PATH", help="HF folder, run or checkpoint (default: the model)")
    parser.add_argument("--data", nargs="+", default=[], metavar="FILE", help="problem sets in veRL's schema")
    parser.add_argument(
        "--samples", nargs="+", default=[], metavar="[SET=]N", help="responses per problem, as in 4 aime24=32"
    )


def run(parsed: argparse.Namespace) -> None:
    """Run the command."""
    from vespo_megatron.launch.evaluate import evaluate, parse_repeats
    from vespo_megatron.recipe.loader import load_recipe

    folder, text = evaluate(
        load_recipe(parsed.recipe, parsed.overrides),
        checkpoint=parsed.checkpoint,
        data=parsed.data,
        repeats=parse_repeats(parsed.samples),
    )
    print(f"{text}\n\nwritten to {folder}")
