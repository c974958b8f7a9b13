"""Write the scripts of a run or a comparison, and give them to SLURM."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from vespo_megatron.errors import UserError
from vespo_megatron.outputs import check_folder, written
from vespo_megatron.recipe.loader import load_recipe, save_recipe
from vespo_megatron.recipe.rules import problems
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.slurm.render import job_script, report_script


def prepare(
    recipe_path: str | Path, overrides: Sequence[str] = (), *, compare: str | None = None, folder: str | Path = "slurm"
) -> list[Path]:
    """Write the scripts to `folder`: one job, or one per value of `compare` ("key=a,b") and the report after them.

    The resolved recipe lies beside its script: later edits of the file do not change a job that waits in the queue.

    Raises:
        UserError: what is wrong with the recipe, or with a variant of it; a folder that cannot be written.
    """
    check_folder(folder, "--folder")
    variants = _variants(recipe_path, overrides, compare)
    scripts = write_jobs({_file_name(recipe): recipe for recipe in variants}, folder)
    if compare is not None:
        base = load_recipe(recipe_path, overrides)
        place, name = Path(base.exp_manager.exp_dir).resolve(), base.exp_manager.name
        runs = [f"{shlex.quote(str(place / recipe.exp_manager.name))}/*" for recipe in variants]
        arguments = f"report {' '.join(runs)} --output {shlex.quote(str(place / f'{name}_compared.html'))}"
        scripts.append(write_report(base, f"{_file_name(base)}_report", arguments, folder))
    return scripts


def write_jobs(recipes: Mapping[str, Recipe], folder: str | Path) -> list[Path]:
    """Write a job per recipe, under these names.

    Raises:
        UserError: what is wrong with one, before anything is written; a folder that cannot be written.
    """
    for recipe in recipes.values():
        for problem in problems(recipe):
            raise problem
        check_folder(recipe.slurm.logs, "slurm.logs")
    folder = Path(folder)
    scripts = []
    for name, recipe in recipes.items():
        recipe_file = folder / f"{name}.yaml"
        with written(recipe_file, "slurm"):
            folder.mkdir(parents=True, exist_ok=True)
            save_recipe(recipe, recipe_file)
        with written(recipe.slurm.logs, "slurm.logs"):
            Path(recipe.slurm.logs).mkdir(parents=True, exist_ok=True)
        scripts.append(_write(folder / f"{name}.sbatch", job_script(recipe, recipe_file)))
    return scripts


def write_report(recipe: Recipe, name: str, arguments: str, folder: str | Path) -> Path:
    """Write the job that runs `vespo-megatron <arguments>` after others, with the recipe's `slurm:` section."""
    return _write(Path(folder) / f"{name}.sbatch", report_script(recipe, name, arguments))


def submit(scripts: Sequence[Path]) -> list[int]:
    """Job ids, in order; a comparison's report (the last of several scripts) waits for the others to end.

    Raises:
        UserError: sbatch is missing or refuses.
    """
    ids: list[int] = []
    for number, script in enumerate(scripts):
        command = ["sbatch", "--parsable"]
        if len(scripts) > 1 and number == len(scripts) - 1:
            command.append("--dependency=afterany:" + ":".join(map(str, ids)))
        try:
            done = subprocess.run([*command, str(script)], capture_output=True, text=True, timeout=60)
        except FileNotFoundError:
            raise UserError(
                "sbatch was not found", where="vespo-megatron slurm --submit", fix="run it on a login node"
            ) from None
        if done.returncode != 0:
            raise UserError(f"sbatch refuses: {done.stderr.strip()}", where=str(script), fix="see the slurm: section")
        ids.append(int(done.stdout.split(";")[0]))
    return ids


def _variants(recipe_path: str | Path, overrides: Sequence[str], compare: str | None) -> list[Recipe]:
    if compare is None:
        return [load_recipe(recipe_path, overrides)]
    key, equals, values = compare.partition("=")
    if not equals or len(values.split(",")) < 2:
        raise UserError(
            f"is {compare!r}", where="--compare", expected="key=value,value as in router_replay.mode=none,R2"
        )
    variants = []
    for value in values.split(","):
        recipe = load_recipe(recipe_path, [*overrides, f"{key}={value}"])
        variants.append(recipe.with_values({"exp_manager.name": f"{recipe.exp_manager.name}_{value}"}))
    return variants


def _file_name(recipe: Recipe) -> str:
    """Of a run, whose name may have folders."""
    return recipe.exp_manager.name.replace("/", "_")


def _write(path: Path, text: str) -> Path:
    with written(path, "slurm"):
        path.write_text(text)
        path.chmod(0o755)
    return path.resolve()
