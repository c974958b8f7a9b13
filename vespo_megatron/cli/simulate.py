"""`vespo-megatron simulate`: the pace of rollouts beside training."""

from __future__ import annotations

import argparse

from vespo_megatron.cli.shared import add_estimates, add_recipe, mean_lengths

HELP = "pace, idle time and lags of rollouts beside training"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_recipe(parser)
    parser.add_argument("--runs", nargs="+", default=[], metavar="RUN", help="measured runs to take the rates from")
    add_estimates(parser, gpu_required=False)


def run(parsed: argparse.Namespace) -> None:
    """Run the command."""
    from vespo_megatron.errors import UserError
    from vespo_megatron.megatron.hardware import gpu
    from vespo_megatron.plan.simulate_command import report
    from vespo_megatron.recipe.loader import load_recipe

    if bool(parsed.runs) == bool(parsed.gpu):
        raise UserError("give one of --runs and --gpu", where="vespo-megatron simulate")
    recipe = load_recipe(parsed.recipe, parsed.overrides)
    device = gpu(parsed.gpu) if parsed.gpu else None
    print(report(recipe, runs=parsed.runs, device=device, lengths=mean_lengths(parsed, recipe), mfu=parsed.mfu))
