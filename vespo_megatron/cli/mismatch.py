"""`vespo-megatron mismatch`: how far engine and trainer are apart, and what each token's distance is made of."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from vespo_megatron.cli.numbers import whole_number
from vespo_megatron.cli.shared import add_recipe

HELP = "how far engine and trainer are apart, with R3 and without, and an account of it token by token"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_recipe(parser)
    parser.add_argument("--batches", type=whole_number(1), default=3, help="rollout batches to measure (default 3)")
    parser.add_argument("--run", metavar="PATH", help="a run, a checkpoint or HF folder, instead of the recipe's model")
    parser.add_argument("--updates", action="store_true", help="train on each batch too: staleness is in the account")


def run(parsed: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    if not parsed.run:
        return _measure(parsed, [])
    from vespo_megatron.launch.model_source import model_folder

    with tempfile.TemporaryDirectory(prefix="vespo_mismatch_") as folder:
        return _measure(parsed, [f"policy.model_name={model_folder(parsed.run, Path(folder) / 'model')}"])


def _measure(parsed: argparse.Namespace, model: list[str]) -> int:
    from vespo_megatron.launch import launcher
    from vespo_megatron.study.account_page import account_table, read_account, write_account_page
    from vespo_megatron.trainer.mismatch_table import table

    try:
        run_dir = launcher.train(
            parsed.recipe,
            [*parsed.overrides, *model, f"grpo.max_num_steps={parsed.batches}"],
            work="mismatch-updates" if parsed.updates else "mismatch",
        )
    except launcher.TrainingFailed as failure:
        print(f"vespo-megatron: {failure}", file=sys.stderr)
        return failure.exit_code
    if run_dir is not None:
        print(table(run_dir))
        print(f"\n{account_table(read_account(run_dir))}\n\naccount: {write_account_page(run_dir)}")
    return 0
