"""`vespo-megatron`: parse and call. Whatever is heavy is imported by the command that needs it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    0: done. 1: a failure nobody explained. 2: `UserError`. 3: a plan that does not fit. 70: the watchdog ended a run
    that hung. 75: stopped by SIGTERM or SIGUSR1 after a checkpoint, to be resumed. 128 + n: stopped by signal n (130
    Ctrl-C, 143 SIGTERM).
    """
    parser = build_parser()
    parsed, rest = parser.parse_known_args(arguments)
    if hasattr(parsed, "overrides"):  # argparse takes them in one stretch only; options may stand between them
        parsed.overrides += [text for text in rest if "=" in text and not text.startswith("-")]
        rest = [text for text in rest if text not in parsed.overrides]
    if rest and not getattr(parsed, "takes_rest", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    from vespo_megatron.errors import UserError
    from vespo_megatron.run.processes import Stopped

    try:
        return parsed.run(parsed, rest) or 0
    except UserError as error:
        print(f"vespo-megatron: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"vespo-megatron: {stopped}", file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        print("vespo-megatron: stopped by SIGINT", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(
        prog="vespo-megatron", description="RL training of Mixture-of-Experts models: Megatron-core, SGLang, VESPO."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train as a recipe says: starts SGLang and torchrun, or joins torchrun")
    _add_recipe(train)
    train.add_argument(
        "--scale-down", metavar="DIR", help="the recipe's layout on a CPU with the tiny model that DIR holds, two steps"
    )
    train.add_argument("--profile", action="store_true", help="trace step 2 into <run>/profile")
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("eval", help="score a checkpoint or a served model: avg@k, pass@k, maj@k")
    _add_recipe(evaluate)
    evaluate.add_argument("--checkpoint", metavar="PATH", help="HF folder, run or checkpoint (default: the model)")
    evaluate.add_argument("--data", nargs="+", default=[], metavar="FILE", help="problem sets in veRL's schema")
    evaluate.add_argument(
        "--samples", nargs="+", default=[], metavar="[SET=]N", help="responses per problem, as in 4 aime24=32"
    )
    evaluate.set_defaults(run=_eval)

    mismatch = commands.add_parser("mismatch", help="how far engine and trainer are apart, with R3 and without")
    _add_recipe(mismatch)
    mismatch.add_argument("--batches", type=int, default=3, help="rollout batches to measure (default 3)")
    mismatch.set_defaults(run=_mismatch)

    recipe = commands.add_parser("recipe", help="look at recipes").add_subparsers(required=True, metavar="ACTION")
    show = recipe.add_parser("show", help="every key with its value, defaults and overrides applied")
    _add_recipe(show)
    show.set_defaults(run=_recipe_show)
    check = recipe.add_parser("check", help="everything that can be found wrong without starting a process")
    _add_recipe(check)
    check.add_argument("--from", dest="origin", choices=["nemo-rl"], help="the file is another project's recipe")
    check.add_argument("--output", metavar="FILE", help="with --from: write what carries over as a recipe")
    check.set_defaults(run=_recipe_check)
    diff = recipe.add_parser("diff", help="the keys in which two recipes differ")
    diff.add_argument("left", metavar="RECIPE")
    diff.add_argument("right", metavar="RECIPE")
    diff.set_defaults(run=_recipe_diff)
    keys = recipe.add_parser("keys", help="every key: what it takes, its default and its meaning")
    keys.add_argument("filter", nargs="?", default="", help="only keys that contain this")
    keys.set_defaults(run=_recipe_keys)
    schema = recipe.add_parser("schema", help="a JSON Schema of recipe files, for editors")
    schema.set_defaults(run=_recipe_schema)

    replay = commands.add_parser(
        "replay-step", help="run a skipped update again on one process: where is it not finite?"
    )
    replay.add_argument("bundle", metavar="BUNDLE", help="a folder under <run>/bundles")
    replay.set_defaults(run=_replay_step)

    serve = commands.add_parser("serve", help="start a recipe's SGLang servers and keep them")
    _add_recipe(serve)
    serve.set_defaults(run=_serve)

    convert = commands.add_parser(
        "convert", help="a Hugging Face folder as a Megatron distributed checkpoint, or the other way round"
    )
    convert.add_argument("source", metavar="SOURCE", help="HF folder, run, checkpoint of a run, distributed checkpoint")
    convert.add_argument("target", metavar="TARGET", help="folder to make, in the other format")
    convert.add_argument("--model", metavar="DIR", help="HF folder with config.json, where the source's run has none")
    convert.add_argument(
        "--layout",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="under torchrun, how the processes share the model: expert_model_parallel_size=8",
    )
    convert.set_defaults(run=_convert)

    data = commands.add_parser("data", help="public problem sets").add_subparsers(required=True, metavar="ACTION")
    prepare = data.add_parser("prepare", help="a public set as parquet in veRL's schema, from the hub or a local copy")
    prepare.add_argument("sets", nargs="+", metavar="SET", help="as in dapo_math aime24 math500; `all` for each")
    prepare.add_argument("--output", default="data", metavar="DIR", help="where <set>.parquet goes (default data)")
    prepare.add_argument("--from", dest="local", metavar="PATH", help="a local copy of the set: a file or a folder")
    prepare.add_argument("--revision", help="commit or tag on the hub (default the newest)")
    prepare.add_argument("--force", action="store_true", help="make it anew")
    prepare.set_defaults(run=_data_prepare)

    slurm = commands.add_parser("slurm", help="a recipe as SLURM batch scripts, submitted with --submit")
    _add_recipe(slurm)
    slurm.add_argument("--submit", action="store_true", help="give the scripts to sbatch")
    slurm.add_argument("--compare", metavar="KEY=A,B", help="one job per value, and the report after them")
    slurm.add_argument("--folder", default="slurm", metavar="DIR", help="where the scripts are written (default slurm)")
    slurm.set_defaults(run=_slurm)

    compare = commands.add_parser("compare", help="run a study's variants with paired seeds, and write its report")
    compare.add_argument("study", metavar="STUDY", help="YAML file: see vespo_megatron/study/spec.py")
    compare.add_argument("overrides", nargs="*", metavar="key=value", help="of every run")
    compare.add_argument("--parallel", type=int, metavar="N", help="runs at a time (default: as the study says)")
    compare.add_argument("--seeds", type=_whole_numbers, metavar="N,…", help="only these of the study's seeds")
    compare.add_argument("--slurm", action="store_true", help="give each run to sbatch, and the report after them")
    compare.add_argument("--report-only", action="store_true", help="run nothing; runs may still be in progress")
    compare.add_argument("--output", metavar="DIR", help="where the report goes (default: the study's output)")
    compare.set_defaults(run=_compare)

    plan = commands.add_parser("plan", help="memory and time of a recipe on a GPU, and what fits if it does not")
    _add_recipe(plan)
    _add_estimates(plan, gpu_required=True)
    plan.add_argument("--compare", type=int, default=8, metavar="N", help="layouts to show beside it (default 8)")
    plan.set_defaults(run=_plan)

    simulate = commands.add_parser("simulate", help="pace, idle time and lags of rollouts beside training")
    _add_recipe(simulate)
    simulate.add_argument("--runs", nargs="+", default=[], metavar="RUN", help="measured runs to take the rates from")
    _add_estimates(simulate, gpu_required=False)
    simulate.set_defaults(run=_simulate)

    doctor = commands.add_parser("doctor", help="what of a run would fail on this machine, and what to do about it")
    doctor.add_argument("--exp-dir", default="runs", metavar="DIR", help="where runs would be kept (default runs)")
    doctor.add_argument("--json", action="store_true", help="for programs")
    doctor.set_defaults(run=_doctor)

    report = commands.add_parser("report", help="one HTML page with the curves of one run or several")
    report.add_argument("runs", nargs="+", metavar="RUN", help="run directory")
    report.add_argument(
        "--output", metavar="FILE", help="default: report.html in the run directory, or here for several"
    )
    report.set_defaults(run=_report)

    kernels = commands.add_parser("kernels", add_help=False, help="φ(W) of the objectives, as a picture and a table")
    kernels.set_defaults(run=_kernels, takes_rest=True)
    return parser


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as in grpo.seed=7")


def _whole_numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 1,2") from None


def _add_estimates(parser: argparse.ArgumentParser, *, gpu_required: bool) -> None:
    parser.add_argument("--gpu", required=gpu_required, metavar="GPU", help="a100-80, h100-80, h200-141, h20-96, …")
    parser.add_argument("--prompt-tokens", type=float, metavar="N", help="mean length (default half of the longest)")
    parser.add_argument("--response-tokens", type=float, metavar="N", help="mean length (default half of the longest)")
    parser.add_argument("--mfu", type=float, default=0.25, help="model FLOPs utilisation in training (default 0.25)")


def _train(parsed: argparse.Namespace, rest: list[str]) -> int:
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


def _eval(parsed: argparse.Namespace, rest: list[str]) -> None:
    from vespo_megatron.launch.evaluate import evaluate, parse_repeats
    from vespo_megatron.recipe.loader import load_recipe

    folder, text = evaluate(
        load_recipe(parsed.recipe, parsed.overrides),
        checkpoint=parsed.checkpoint,
        data=parsed.data,
        repeats=parse_repeats(parsed.samples),
    )
    print(f"{text}\n\nwritten to {folder}")


def _mismatch(parsed: argparse.Namespace, rest: list[str]) -> int:
    from vespo_megatron.launch import launcher
    from vespo_megatron.trainer.mismatch_table import table

    try:
        run_dir = launcher.train(
            parsed.recipe, [*parsed.overrides, f"grpo.max_num_steps={parsed.batches}"], work="mismatch"
        )
    except launcher.TrainingFailed as failure:
        print(f"vespo-megatron: {failure}", file=sys.stderr)
        return failure.exit_code
    if run_dir is not None:
        print(table(run_dir))
    return 0


def _recipe_show(parsed: argparse.Namespace, rest: list[str]) -> None:
    from vespo_megatron.recipe.loader import load_recipe, to_yaml
    from vespo_megatron.rollout_sglang.api_key import hide_api_key

    print(to_yaml(hide_api_key(load_recipe(parsed.recipe, parsed.overrides))), end="")


def _recipe_check(parsed: argparse.Namespace, rest: list[str]) -> None:
    if parsed.origin:
        from vespo_megatron.recipe.nemo_rl_report import check

        print(check(parsed.recipe, parsed.output))
        return
    from vespo_megatron.launch import preflight
    from vespo_megatron.recipe.loader import load_recipe

    preflight.check(load_recipe(parsed.recipe, parsed.overrides))
    print(f"{parsed.recipe}: nothing wrong found")


def _recipe_diff(parsed: argparse.Namespace, rest: list[str]) -> None:
    from vespo_megatron.recipe.loader import differences, load_recipe

    for name, (left, right) in differences(load_recipe(parsed.left), load_recipe(parsed.right)).items():
        print(f"{name}: {left!r} -> {right!r}")


def _recipe_keys(parsed: argparse.Namespace, rest: list[str]) -> None:
    from vespo_megatron.recipe.documentation import documentation

    for name, meaning in documentation().items():
        if parsed.filter in name:
            print(f"{name}: {meaning}" if meaning else name)


def _recipe_schema(parsed: argparse.Namespace, rest: list[str]) -> None:
    import json

    from vespo_megatron.recipe.json_schema import json_schema

    print(json.dumps(json_schema(), indent=1, ensure_ascii=False))


def _replay_step(parsed: argparse.Namespace, rest: list[str]) -> None:
    from pathlib import Path

    from vespo_megatron.trainer.replay_step import replay

    print(replay(Path(parsed.bundle)))


def _serve(parsed: argparse.Namespace, rest: list[str]) -> None:
    from vespo_megatron.launch import launcher

    launcher.serve(parsed.recipe, parsed.overrides)


def _convert(parsed: argparse.Namespace, rest: list[str]) -> None:
    import os

    from vespo_megatron.launch.convert import convert

    done = convert(parsed.source, parsed.target, model=parsed.model, layout=parsed.layout)
    if os.environ.get("RANK", "0") == "0":
        print(done)


def _data_prepare(parsed: argparse.Namespace, rest: list[str]) -> None:
    from vespo_megatron.data.public.prepare import prepare
    from vespo_megatron.data.public.sets import SETS

    for name in SETS if parsed.sets == ["all"] else parsed.sets:
        print(
            prepare(name, parsed.output, local=parsed.local, revision=parsed.revision, force=parsed.force), flush=True
        )


def _slurm(parsed: argparse.Namespace, rest: list[str]) -> None:
    from vespo_megatron.slurm import submit

    scripts = submit.prepare(parsed.recipe, parsed.overrides, compare=parsed.compare, folder=parsed.folder)
    jobs = submit.submit(scripts) if parsed.submit else [None] * len(scripts)
    for script, job in zip(scripts, jobs, strict=True):
        print(f"{script}" + (f": job {job}" if job else ""))


def _compare(parsed: argparse.Namespace, rest: list[str]) -> int:
    from pathlib import Path

    from vespo_megatron.study.compare import compare
    from vespo_megatron.study.spec import load_study
    from vespo_megatron.study.study_report import write_study_report

    study = load_study(parsed.study)
    if parsed.seeds:
        study = study.with_seeds(parsed.seeds)
    if parsed.slurm:
        from vespo_megatron.slurm.study_jobs import prepare_jobs
        from vespo_megatron.slurm.submit import submit

        scripts = prepare_jobs(study, parsed.study, extra=parsed.overrides)
        for script, job in zip(scripts, submit(scripts), strict=True):
            print(f"{script}: job {job}")
        return 0
    failed = {} if parsed.report_only else compare(study, extra=parsed.overrides, parallel=parsed.parallel)
    print(f"report: {write_study_report(study, Path(parsed.output) if parsed.output else None)}")
    for cell, reason in failed.items():
        print(f"vespo-megatron: {cell.name} failed: {reason}", file=sys.stderr)
    return 1 if failed else 0


def _plan(parsed: argparse.Namespace, rest: list[str]) -> int:
    from vespo_megatron.megatron.hardware import gpu
    from vespo_megatron.plan import planner
    from vespo_megatron.plan.published import shape_of
    from vespo_megatron.recipe.loader import load_recipe

    recipe = load_recipe(parsed.recipe, parsed.overrides)
    device, shape, lengths = gpu(parsed.gpu), shape_of(recipe.policy.model_name), _lengths(parsed, recipe)
    made = planner.plan(shape, recipe, device, lengths, parsed.mfu)
    print(planner.report(shape, made, lengths, mfu=parsed.mfu, compare=parsed.compare))
    return 0 if made.fits else 3


def _simulate(parsed: argparse.Namespace, rest: list[str]) -> None:
    from vespo_megatron.errors import UserError
    from vespo_megatron.megatron.hardware import gpu
    from vespo_megatron.plan.simulate_command import report
    from vespo_megatron.recipe.loader import load_recipe

    if bool(parsed.runs) == bool(parsed.gpu):
        raise UserError("give one of --runs and --gpu", where="vespo-megatron simulate")
    recipe = load_recipe(parsed.recipe, parsed.overrides)
    device = gpu(parsed.gpu) if parsed.gpu else None
    print(report(recipe, runs=parsed.runs, device=device, lengths=_lengths(parsed, recipe), mfu=parsed.mfu))


def _lengths(parsed: argparse.Namespace, recipe):
    from vespo_megatron.plan.timing import Lengths, default_lengths

    usual = default_lengths(recipe)
    return Lengths(parsed.prompt_tokens or usual.prompt, parsed.response_tokens or usual.response)


def _doctor(parsed: argparse.Namespace, rest: list[str]) -> int:
    from vespo_megatron.doctor.command import doctor

    return doctor(parsed.exp_dir, as_json=parsed.json)


def _report(parsed: argparse.Namespace, rest: list[str]) -> None:
    from pathlib import Path

    from vespo_megatron.study.report import write_report

    folder = Path(parsed.runs[0]) if len(parsed.runs) == 1 else Path()
    print(write_report(parsed.runs, parsed.output or folder / "report.html"))


def _kernels(parsed: argparse.Namespace, rest: list[str]) -> int:
    from vespo_megatron.losses import objectives_command

    parser = argparse.ArgumentParser(prog="vespo-megatron kernels", description=objectives_command.__doc__)
    objectives_command.add_arguments(parser)
    return objectives_command.run(parser.parse_args(rest))


if __name__ == "__main__":
    sys.exit(main())
