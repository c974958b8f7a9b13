"""`vespo-megatron doctor`: what of a run would fail on this machine."""

from __future__ import annotations

import argparse

HELP = "what of a run would fail on this machine, and what to do about it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--exp-dir", default="runs", metavar="DIR", help="where runs would be kept (default runs)")
    parser.add_argument("--json", action="store_true", help="for programs")


def run(parsed: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    from vespo_megatron.doctor.command import doctor

    return doctor(parsed.exp_dir, as_json=parsed.json)
