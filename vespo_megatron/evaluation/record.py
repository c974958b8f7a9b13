"""Evaluations on disk: one line of JSON per problem, and a table to read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from vespo_megatron.evaluation.scores import Problem, Score, average, by_group, by_set, summary


def write_problems(problems: Sequence[Problem], path: Path) -> None:
    """One JSON object per line with `Problem`'s fields; the file appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    lines = (json.dumps(asdict(problem), default=str, ensure_ascii=False) + "\n" for problem in problems)
    partial.write_text("".join(lines), encoding="utf-8")
    partial.replace(path)


def read_problems(path: Path) -> list[Problem]:
    """What `write_problems` wrote."""
    problems = []
    for line in path.read_text(encoding="utf-8").splitlines():
        fields = json.loads(line)
        lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        problems.append(Problem(**(fields | lists)))
    return problems


def metrics(problems: Sequence[Problem]) -> dict[str, float]:
    """`eval/<set>/avg@n` and the others of `summary`, the half-width of avg@n's interval as `ci95`, mean length.

    Where they were drawn, `greedy` is the mean of the greedy responses; `by/<group>` and `greedy_by/<group>` are the
    means of a group's problems. `eval/average` is the mean of the sets' avg@n, each set as much as another.
    """
    found: dict[str, float] = {}
    sets = by_set(problems)
    for name, members in sets.items():
        for measure, score in summary(members).items():
            found[f"eval/{slug(name)}/{measure}"] = score.value
            if measure.startswith("avg@") and score.high == score.high:
                found[f"eval/{slug(name)}/ci95"] = (score.high - score.low) / 2
        found |= _greedy(f"eval/{slug(name)}/greedy", members)
        for group, of_group in by_group(members).items():
            found[f"eval/{slug(name)}/by/{slug(group)}"] = float(np.mean([average(problem) for problem in of_group]))
            found |= _greedy(f"eval/{slug(name)}/greedy_by/{slug(group)}", of_group)
    found["eval/average"] = float(np.mean([np.mean([average(each) for each in members]) for members in sets.values()]))
    found["eval/response_length_mean"] = float(np.mean([n for problem in problems for n in problem.lengths]))
    return found


def _greedy(name: str, problems: Sequence[Problem]) -> dict[str, float]:
    rewards = [problem.greedy for problem in problems if problem.greedy is not None]
    return {name: float(np.mean(rewards))} if rewards else {}


def table(problems: Sequence[Problem]) -> str:
    """Markdown: a row per set, the 95% interval of every score in brackets."""
    sets = by_set(problems)
    summaries = {name: summary(members) for name, members in sets.items()}
    columns = list(dict.fromkeys(measure for scores in summaries.values() for measure in scores))
    columns.sort(key=lambda measure: (["avg", "pass", "maj"].index(measure.split("@")[0]), int(measure.split("@")[1])))
    lines = [
        "| set | problems | " + " | ".join(columns) + " | tokens | truncated |",
        "|---|---|" + "---|" * (len(columns) + 2),
    ]
    for name, members in sets.items():
        cells = [cell(summaries[name].get(column)) for column in columns]
        lengths = [n for problem in members for n in problem.lengths]
        cut = [reason == "length" for problem in members for reason in problem.finish_reasons]
        row = [name, str(len(members)), *cells, f"{np.mean(lengths):.0f}", f"{np.mean(cut):.1%}"]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def slug(name: str) -> str:
    """A set's name as part of a metric's."""
    return name.replace("/", "_").replace(" ", "_") or "validation"


def cell(score: Score | None) -> str:
    """In percent, its interval in brackets where it has one."""
    if score is None:
        return "-"
    interval = "" if score.low != score.low else f" [{100 * score.low:.1f}, {100 * score.high:.1f}]"
    return f"{100 * score.value:.1f}{interval}"
