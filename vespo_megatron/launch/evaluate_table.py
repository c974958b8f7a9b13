"""`vespo-megatron eval --table N RECIPE`: the paper's protocol of a table, over sets that `data prepare` has made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vespo_megatron.data.public.sets import SETS
from vespo_megatron.errors import UserError
from vespo_megatron.evaluation.beside_paper import Evaluated, beside_paper
from vespo_megatron.evaluation.paper import SAMPLING, TABLES
from vespo_megatron.evaluation.record import read_problems
from vespo_megatron.launch.evaluate import PROBLEMS, evaluate
from vespo_megatron.recipe.schema import DatasetConfig, Recipe, SetConfig

PAPER = "paper.md"
_CODE_DEADLINE = 900.0
"""Seconds of all tests of one response, at least."""
_LIMITS: dict[str, dict[str, Any]] = {
    # Every test, 6 s each (`timeout` of LiveCodeBench's lcb_runner/evaluation/testing_util.py, which speaks of 4 GB).
    "livecodebench_v6": {"max_tests": 1_000_000, "test_timeout": 6.0, "memory_mb": 4096},
    # One script holds all of a problem's tests. EvalPlus bounds each of them, by the time of its own solution.
    "humaneval_plus": {"test_timeout": 60.0, "memory_mb": 4096},
    "mbpp_plus": {"test_timeout": 60.0, "memory_mb": 4096},
}


def evaluate_table(
    recipe: Recipe,
    number: int,
    *,
    sets: str | Path,
    partial: bool = False,
    checkpoint: str | None = None,
    repeats: Mapping[str, int] | None = None,
) -> tuple[Path, str]:
    """`evaluate` by the protocol of a table, and `paper.md`; returns the folder and both tables.

    Args:
        number: of the paper's table.
        sets: folder of the benchmarks' files, as `data prepare` names them.
        partial: leave out benchmarks that are not there.
        checkpoint, repeats: as in `evaluate`; without repeats as many responses as the paper's.

    Raises:
        UserError: benchmarks that are not there, too few responses for a pass@k; as `evaluate`.
    """
    repeats = repeats or {}
    asked = table_recipe(recipe, number, Path(sets), partial=partial)
    for each in TABLES[number].benchmarks:
        drawn = repeats.get(each.name, repeats.get("", each.samples))
        if each.pass_at is not None and drawn < each.pass_at:
            raise UserError(
                f"{drawn} responses are too few for pass@{each.pass_at} of {each.name}",
                where="--samples",
                expected=f"at least {each.pass_at}",
            )
    folder, text = evaluate(asked, checkpoint=checkpoint, repeats=repeats)
    model = Path(checkpoint or recipe.policy.model_name).name
    what = Evaluated(model, recipe.loss_fn.name, recipe.num_mini_batches)
    sizes = {name: _rows(each.places[0]) for name, each in asked.data.validation.given.items()}
    beside = beside_paper(number, read_problems(folder / PROBLEMS), sizes, what)
    beside += f"\n- {_sampling(recipe)}; {SAMPLING}."
    (folder / PAPER).write_text(beside + "\n", encoding="utf-8")
    return folder, f"{text}\n\n{beside}"


def table_recipe(recipe: Recipe, number: int, folder: Path, *, partial: bool = False) -> Recipe:
    """The recipe with a table's benchmarks as its validation sets, each with its number of responses and its reward.

    Raises:
        UserError: benchmarks are not in the folder; with `partial`: none is.
    """
    benchmarks = TABLES[number].benchmarks
    paths = {each.name: folder / f"{each.name}.parquet" for each in benchmarks}
    missing = [name for name, path in paths.items() if not path.is_file()]
    if len(missing) == len(paths) or (missing and not partial):
        raise UserError(
            f"{folder} holds no {', '.join(f'{name}.parquet' for name in missing)}",
            where=f"eval --table {number}",
            fix=f"vespo-megatron data prepare {' '.join(missing)} --output {folder}"
            + ("" if len(missing) == len(paths) else "; or --partial, without them"),
        )
    given = {
        each.name: SetConfig(
            path=str(paths[each.name]),
            num_samples=each.samples,
            reward=SETS[each.name].reward,
            reward_kwargs=_LIMITS.get(each.name, {}) | _unfenced(recipe, SETS[each.name].reward),
        )
        for each in benchmarks
        if each.name not in missing
    }
    values: dict[str, Any] = {"data.validation": DatasetConfig(sets=given), "grpo.max_val_samples": 1_000_000}
    if any(each.reward == "code" for each in given.values()):
        values["env.timeout"] = max(recipe.env.timeout, _CODE_DEADLINE)
    return recipe.with_values(values)


def _unfenced(recipe: Recipe, reward: str) -> dict[str, Any]:
    """What the recipe's own code reward says of machines that cannot fence programs."""
    own = recipe.env.reward_kwargs if recipe.env.reward == "code" and not recipe.env.rewards else {}
    return {"allow_unsafe_code": True} if reward == "code" and own.get("allow_unsafe_code") else {}


def _rows(path: str) -> int:
    import pyarrow.parquet

    return int(pyarrow.parquet.read_metadata(path).num_rows)


def _sampling(recipe: Recipe) -> str:
    generation = recipe.policy.generation
    temperature = generation.temperature if generation.val_temperature is None else generation.val_temperature
    top_p = generation.top_p if generation.val_top_p is None else generation.val_top_p
    return f"Drawn with temperature {temperature:g}, top-p {top_p:g}"
