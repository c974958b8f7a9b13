"""`vespo-megatron replay-step`: a skipped update again, to find what was not finite."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "run a skipped update again on one process: where is it not finite?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("bundle", metavar="BUNDLE", help="a folder under <run>/bundles")


def run(parsed: argparse.Namespace) -> None:
    """Run the command."""
    from vespo_megatron.trainer.replay_step import replay

    print(replay(Path(parsed.bundle)))
