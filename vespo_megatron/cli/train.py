"""`vespo-megatron train`: train as a recipe says."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vespo_megatron.cli.shared import add_recipe
from vespo_megatron.errors import UserError

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
        _report(run_dir)
    return 0


def _report(run_dir: Path) -> None:
    """The run has ended well, whatever becomes of its report."""
    from vespo_megatron.study.report import write_report

    try:
        print(f"report: {write_report([run_dir], run_dir / 'report.html')}")
    except Exception as error:
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        print(
            f"vespo-megatron: the run has ended well, but not its report: {reason}\n"
            f"  to do: vespo-megatron report {run_dir}",
            file=sys.stderr,
        )
