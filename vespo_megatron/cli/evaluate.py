"""`vespo-megatron eval`: score a checkpoint or a served model."""

from __future__ import annotations

import argparse

from vespo_megatron.cli.numbers import whole_number
from vespo_megatron.cli.shared import add_recipe

HELP = "score a checkpoint or a served model: avg@k, pass@k, maj@k"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_recipe(parser)
    parser.add_argument("--checkpoint", metavar="PATH", help="HF folder, run or checkpoint (default: the model)")
    parser.add_argument(
        "--best",
        action="store_true",
        help="of the run: its best checkpoint (checkpointing.metric_name), not its newest",
    )
    parser.add_argument("--data", nargs="+", default=[], metavar="FILE", help="problem sets in veRL's schema")
    parser.add_argument(
        "--samples", nargs="+", default=[], metavar="[SET=]N", help="responses per problem, as in 4 aime24=32"
    )
    parser.add_argument(
        "--table",
        type=whole_number(1, 4),
        metavar="N",
        help="the paper's protocol of this table, 1 to 4, its numbers beside ours",
    )
    parser.add_argument("--sets", metavar="DIR", help="with --table: what `data prepare` has made (default data)")
    parser.add_argument("--partial", action="store_true", help="with --table: leave out sets that are not there")


def run(parsed: argparse.Namespace) -> None:
    """Run the command."""
    from vespo_megatron.errors import UserError
    from vespo_megatron.launch.best_checkpoint import best_checkpoint
    from vespo_megatron.launch.evaluate import evaluate, parse_repeats
    from vespo_megatron.launch.evaluate_table import evaluate_table
    from vespo_megatron.recipe.loader import load_recipe

    checkpoint = parsed.checkpoint
    if parsed.best:
        if checkpoint is None:
            raise UserError("has no run", where="--best", fix="name it: --checkpoint RUN")
        checkpoint = str(best_checkpoint(checkpoint))
        print(f"checkpoint {checkpoint}", flush=True)
    recipe, repeats = load_recipe(parsed.recipe, parsed.overrides), parse_repeats(parsed.samples)
    if parsed.table is None:
        if parsed.sets or parsed.partial:
            raise UserError("is for --table", where="--sets" if parsed.sets else "--partial", fix="leave it out")
        folder, text = evaluate(recipe, checkpoint=checkpoint, data=parsed.data, repeats=repeats)
    elif parsed.data:
        raise UserError("and --table are two choices of sets", where="--data", fix="leave one out")
    else:
        folder, text = evaluate_table(
            recipe,
            parsed.table,
            sets=parsed.sets or "data",
            partial=parsed.partial,
            checkpoint=checkpoint,
            repeats=repeats,
        )
    print(f"{text}\n\nwritten to {folder}")
