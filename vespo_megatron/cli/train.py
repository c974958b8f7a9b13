"""`vespo-megatron train`: train as a recipe says."""

from __future__ import annotations

import argparse
import sys

from vespo_megatron.cli.shared import add_recipe

HELP = "train as a recipe says: starts SGLang and the ranks, or is one of them under torchrun"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_recipe(parser)
    parser.add_argument(
        "--scale-down", metavar="DIR", help="the recipe's layout on a CPU with the tiny model that DIR holds, two steps"
    )
    parser.add_argument("--profile", action="store_true", help="trace step 2 into <run>/profile")


def run(parsed: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    from vespo_megatron.launch import launcher

    overrides = [*parsed.overrides, *(["logger.profile_step=2"] if parsed.profile else [])]
    try:
        run_dir = launcher.train(parsed.recipe, overrides, tiny_folder=parsed.scale_down)
    except launcher.TrainingFailed as failure:
        print(f"vespo-megatron: {failure}", file=sys.stderr)
        return failure.exit_code
    if run_dir is not None:
        from vespo_megatron.study.report import write_report

        print(f"report: {write_report([run_dir], run_dir / 'report.html')}")
    return 0
