"""An evaluation by a table's protocol, beside what the paper reports in that table; as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from vespo_megatron.evaluation.paper import SOURCE, TABLES, Benchmark, Reported, Table
from vespo_megatron.evaluation.record import cell
from vespo_megatron.evaluation.scores import Problem, Score, average, by_set, pass_at, score


@dataclass(frozen=True)
class Evaluated:
    """What was evaluated, as its recipe says."""

    model: str
    objective: str
    updates: int
    """N, updates per rollout batch."""


def measured(problems: Sequence[Problem], benchmark: Benchmark) -> tuple[str, Score]:
    """The measure and its score: the benchmark's, of as many responses as there are of every problem."""
    fewest = min(len(problem.rewards) for problem in problems)
    if benchmark.pass_at is None:
        return f"avg@{fewest}", score(problems, average)
    k = min(benchmark.pass_at, fewest)
    return f"pass@{k}", score(problems, partial(pass_at, k=k))


def beside_paper(number: int, problems: Sequence[Problem], sizes: Mapping[str, int], what: Evaluated) -> str:
    """Our row, every row of the paper's table, and what is not as in the paper.

    Args:
        number: of the table.
        problems: of all sets, whose data sources are the benchmarks' names.
        sizes: how many problems each set has.
    """
    table, sets = TABLES[number], by_set(problems)
    found = {each.name: measured(sets[each.name], each) for each in table.benchmarks if each.name in sets}
    mean = 100 * sum(value.value for _, value in found.values()) / len(found)
    cells = [_own_cell(each, found.get(each.name)) for each in table.benchmarks]
    rows = [[f"here: {what.model}", what.objective, str(what.updates), f"{mean:.1f}", *cells]]
    rows += [_reported(each, what, len(table.benchmarks)) for each in table.rows]
    titles = [f"{each.title} {each.measure}" for each in table.benchmarks]
    head = ["", "objective", "N", "average", *titles]
    lines = [f"Table {number} of {SOURCE}: {table.about}. In percent.", ""]
    lines += ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    lost = [f"{len(sets[name])} of {sizes[name]} of {name}" for name in found if len(sets[name]) < sizes[name]]
    return "\n".join([*lines, "", *_remarks(table, found, lost)])


def _own_cell(benchmark: Benchmark, found: tuple[str, Score] | None) -> str:
    if found is None:
        return "-"
    measure, value = found
    return cell(value) + ("" if measure == benchmark.measure else f" ({measure})")


def _reported(row: Reported, what: Evaluated, benchmarks: int) -> list[str]:
    same = row.objective == what.objective and row.updates in (None, what.updates)
    updates = "" if row.updates is None else str(row.updates)
    value = f"**{row.average:.1f}**" if same else f"{row.average:.1f}"
    return [f"paper: {row.model}", row.objective, updates, value, *[""] * benchmarks]


def _remarks(table: Table, found: dict[str, tuple[str, Score]], lost: list[str]) -> list[str]:
    missing = [each.title for each in table.benchmarks if each.name not in found]
    other = [each.title for each in table.benchmarks if each.name in found and found[each.name][0] != each.measure]
    remarks = ["Bold: the recipe's objective and N. The paper's numbers for single benchmarks are not known here."]
    if missing:
        remarks.append(f"Our average is without {', '.join(missing)}; the paper's is of all.")
    if other:
        remarks.append(f"Another number of responses than the paper's on {', '.join(other)}.")
    if lost:
        remarks.append(
            f"Not all problems: {', '.join(lost)}; the others' prompts are too long, or no answer was usable."
        )
    return [f"- {remark}" for remark in [*remarks, *table.notes]]
