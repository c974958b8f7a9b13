"""`vespo-megatron slurm`: a recipe as SLURM batch scripts."""

from __future__ import annotations

import argparse

from vespo_megatron.cli.shared import add_recipe

HELP = "a recipe as SLURM batch scripts, submitted with --submit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_recipe(parser)
    parser.add_argument("--submit", action="store_true", help="give the scripts to sbatch")
    parser.add_argument("--compare", metavar="KEY=A,B", help="one job per value, and the report after them")
    parser.add_argument(
        "--folder", default="slurm", metavar="DIR", help="where the scripts are written (default slurm)"
    )


def run(parsed: argparse.Namespace) -> None:
    """Run the command."""
    from vespo_megatron.slurm import submit

    scripts = submit.prepare(parsed.recipe, parsed.overrides, compare=parsed.compare, folder=parsed.folder)
    jobs = submit.submit(scripts) if parsed.submit else [None] * len(scripts)
    for script, job in zip(scripts, jobs, strict=True):
        print(f"{script}" + (f": job {job}" if job else ""))
