"""`vespo-megatron compare`: a study's runs and its report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vespo_megatron.cli.numbers import whole_number, whole_numbers

HELP = "run a study's variants with paired seeds, and write its report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("study", metavar="STUDY", help="YAML file: see vespo_megatron/study/spec.py")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of every run")
    parser.add_argument(
        "--parallel", type=whole_number(1), metavar="N", help="runs at a time (default: as the study says)"
    )
    parser.add_argument("--seeds", type=whole_numbers(0), metavar="N,…", help="only these of the study's seeds")
    parser.add_argument("--slurm", action="store_true", help="give each run to sbatch, and the report after them")
    parser.add_argument("--report-only", action="store_true", help="run nothing; runs may still be in progress")
    parser.add_argument("--output", metavar="DIR", help="where the report goes (default: the study's output)")


def run(parsed: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    from vespo_megatron.outputs import check_folder
    from vespo_megatron.slurm.study_jobs import prepare_jobs
    from vespo_megatron.study.compare import compare
    from vespo_megatron.study.outcomes import read_outcomes
    from vespo_megatron.study.spec import load_study
    from vespo_megatron.study.study_report import write_study_report
    from vespo_megatron.study.tuning import choices, tuned, tuning_study

    study = load_study(parsed.study)
    if parsed.output:
        check_folder(parsed.output, "--output")
    if parsed.seeds:
        study = study.with_seeds(parsed.seeds)
    chosen, failed = None, {}
    if study.tuning:
        tuning = tuning_study(study, study.tuning)
        if not (parsed.slurm or parsed.report_only):
            failed = compare(tuning, extra=parsed.overrides, parallel=parsed.parallel)
        chosen = choices(read_outcomes(tuning))
        if parsed.slurm and chosen is None:
            return _submit(prepare_jobs(tuning, extra=parsed.overrides), "run this again once they have ended")
        if chosen is not None:
            print("\n".join(f"{study.tuning.key} of {choice.sentence}" for choice in chosen))
            study = tuned(study, study.tuning, chosen)
    if parsed.slurm:
        return _submit(prepare_jobs(study, study_file=parsed.study, extra=parsed.overrides))
    if not (failed or parsed.report_only):
        failed = compare(study, extra=parsed.overrides, parallel=parsed.parallel)
    output = Path(parsed.output) if parsed.output else None
    print(f"report: {write_study_report(study, output, chosen or ())}")
    for cell, reason in failed.items():
        print(f"vespo-megatron: {cell.name} failed: {reason}", file=sys.stderr)
    return 1 if failed else 0


def _submit(scripts: list[Path], afterwards: str = "") -> int:
    from vespo_megatron.slurm.submit import submit

    for script, job in zip(scripts, submit(scripts), strict=True):
        print(f"{script}: job {job}")
    if afterwards:
        print(afterwards)
    return 0
