"""`vespo-megatron report`: runs as one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "one HTML page with the curves of one run or several"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory")
    parser.add_argument(
        "--output", metavar="FILE", help="default: report.html in the run directory, or here for several"
    )


def run(parsed: argparse.Namespace) -> None:
    """Run the command."""
    from vespo_megatron.study.report import write_report

    folder = Path(parsed.runs[0]) if len(parsed.runs) == 1 else Path()
    print(write_report(parsed.runs, parsed.output or folder / "report.html"))
