"""A study's report: `report.html`, `tables.md`, `cells.csv`, `curves.csv` and its figures as PNGs, in one folder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from vespo_megatron.outputs import check_folder, written
from vespo_megatron.study.comparison import ACCURACY, Row, Stated, compare_primary, compare_rows
from vespo_megatron.study.measures import LATE, RATIOS
from vespo_megatron.study.outcomes import COLLAPSE, cells_csv, curves_csv, read_outcomes
from vespo_megatron.study.pages import page
from vespo_megatron.study.provenance import facts
from vespo_megatron.study.spec import Study
from vespo_megatron.study.statistics import LEVEL, Difference
from vespo_megatron.study.study_figures import figures
from vespo_megatron.study.tuning import Choice


def write_study_report(study: Study, folder: Path | None = None, chosen: Sequence[Choice] = ()) -> Path:
    """Write everything to `folder` (default the study's output). Returns the page; runs may still be in progress.

    Args:
        chosen: what was chosen for each variant beforehand.

    Raises:
        UserError: the folder cannot be written.
    """
    folder, where = (study.output, f"{study.name}: output") if folder is None else (folder, "--output")
    check_folder(folder, where)
    outcomes = read_outcomes(study)
    rows, stated = compare_rows(study, outcomes), compare_primary(study, outcomes)
    galleries = figures(study, rows)
    texts = {
        "cells.csv": cells_csv(study, outcomes),
        "curves.csv": curves_csv(study, outcomes),
        "tables.md": tables(study, rows, stated, chosen),
        "report.html": page(
            "study.html.j2",
            title=f"Study: {study.name}",
            study=study,
            rows=rows,
            primary=primary_sentences(stated),
            sentences=sentences(rows),
            chosen=chosen,
            galleries={heading: list(pictures.values()) for heading, pictures in galleries.items()},
            late=[name for name in LATE if _present(rows, name)],
            collapse=COLLAPSE,
            level=LEVEL,
            facts=facts(outcomes),
            done=sum(outcome.state == "finished" for outcome in outcomes),
            outcomes=outcomes,
        ),
    }
    with written(folder, where):
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        for pictures in galleries.values():
            for name, picture in pictures.items():
                (folder / "figures" / f"{name}.png").write_bytes(picture.content)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    return folder / "report.html"


def primary_sentences(stated: Sequence[Stated]) -> list[str]:
    """What became of the comparisons that were stated before, in their order."""
    return [
        _sentence(
            each.primary.variant, each.primary.against, each.primary.setting, ACCURACY, each.difference, each.outcome
        )
        for each in stated
    ]


def sentences(rows: Sequence[Row]) -> list[str]:
    """What the comparisons say, one sentence each: accuracy first, and of each measure what was found.

    Nothing of pairs that no seed has finished yet.
    """
    said = []
    for row in rows:
        for measure, difference in row.differences.items():
            if not difference.mean.count:
                continue
            found = difference.verdict in ("higher", "lower")
            text = _sentence(row.variant, row.baseline, row.setting, measure, difference, difference.verdict)
            said.append((measure != ACCURACY, measure, not found, text))
    return [text for *_, text in sorted(said, key=lambda item: item[:3])]


def _sentence(
    variant: str, against: str | None, setting: Sequence[str], measure: str, difference: Difference, verdict: str
) -> str:
    where = f" at {', '.join(setting)}" if setting else ""

    def number(value: float) -> str:
        return f"×{math.exp(value):.3g}" if measure in RATIOS else f"{value:+.3f}"

    by = difference.mean
    numbers = f"{number(by.value)} {measure}"
    if not math.isnan(by.half):
        numbers += f" [{number(by.value - by.half)}, {number(by.value + by.half)}]"
    if not math.isnan(difference.adjusted_p):
        numbers += f", adjusted p = {difference.adjusted_p:.2g}"
    return f"{variant} against {against}{where}: {verdict} ({numbers}, {by.count} seeds)."


def tables(study: Study, rows: Sequence[Row], stated: Sequence[Stated], chosen: Sequence[Choice]) -> str:
    """Markdown: what was stated before; accuracies by variant and setting, the paper's; every other comparison."""
    place = {(row.variant, row.setting): row for row in rows}
    settings = [each for each in study.settings if any(place[v, each].finished for v in study.variants)]
    settings = settings or study.settings  # before the first run has finished
    headings = [" ".join(setting) or "accuracy" for setting in settings]
    lines = (
        ["Stated before it was run:", "", *(f"- {text}" for text in primary_sentences(stated)), ""] if stated else []
    )
    if study.tuning and chosen:
        lines += [f"`{study.tuning.key}`, chosen on seeds {_listed(study.tuning.seeds)}:", ""]
        lines += [*(f"- {choice.sentence}" for choice in chosen), ""]
    lines += [f"| {next(iter(study.axes))} | {' | '.join(headings)} |", f"|---|{'---|' * len(headings)}"]
    for variant in study.variants:
        cells = [_accuracy_text(place[variant, setting]) for setting in settings]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    if study.published.values:
        lines += ["", f"Published ({study.published.source}), per cent:", ""]
        lines += [f"| {next(iter(study.axes))} | {' | '.join(headings)} |", f"|---|{'---|' * len(headings)}"]
        for variant in study.variants:
            values = [study.published.value((variant, *setting)) for setting in settings]
            if any(value is not None for value in values):
                lines.append(f"| {variant} | {' | '.join('-' if v is None else f'{v:.1f}' for v in values)} |")
    shown = [name for name in LATE if _present(rows, name)]
    lines += ["", "Means over the last quarter of the steps:", ""]
    lines += [f"| {' | '.join(study.axes)} | {' | '.join(shown)} |", f"|{'---|' * (len(study.axes) + len(shown))}"]
    for row in (row for row in rows if row.finished):
        late = [f"{row.late[name].value:.4g}" if row.late[name].count else "-" for name in shown]
        lines.append(f"| {' | '.join((row.variant, *row.setting))} | {' | '.join(late)} |")
    heading = ["", "Exploratory:"] if stated else []
    return "\n".join([*lines, *heading, "", *(f"- {text}" for text in sentences(rows)), ""])


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def _present(rows: Sequence[Row], name: str) -> bool:
    return any(row.late[name].count for row in rows)


def _accuracy_text(row: Row) -> str:
    text = row.accuracy.text()
    if row.finished < len(row.runs):
        text += f" ({row.finished} of {len(row.runs)} runs)"
    return text + (f", {row.collapsed} collapsed" if row.collapsed else "")
