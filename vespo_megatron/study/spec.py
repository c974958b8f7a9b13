"""A study: which runs it is made of, and what is compared. Read from YAML::

    name: mismatch                         # runs are kept in <output>/<variant>/seed_<n>
    base: ../../examples/tiny_moe/vespo.yaml   # relative to this file
    output: runs/studies/mismatch
    seeds: [1, 2, 3]                       # paired: the same seeds, prompts and initial weights for every variant
    overrides: [grpo.max_num_steps=40]     # of every run
    axes:                                  # a run for every combination of one level of each
      objective:
        grpo: [loss_fn.name=grpo]
        vespo: [loss_fn.name=vespo]
      staleness:
        N=4: [grpo.num_prompts_per_step=32]
    baseline: vespo                        # a level of the first axis, which every other one is compared with
    baselines: {vespo-r2: vespo}           # …but these, which have one of their own
    accuracy: eval/running_sums/avg@4      # the metric of the tables
    last_evaluations: 3                    # of which a run's mean is its accuracy; default: the last one alone
    primary:                               # what it is run to find out, written down before: any other comparison is
      - vespo > grpo at N=4                # exploratory. `>` says what is expected, `vs` expects nothing
    exploratory_seeds: [1]                 # of runs that are in no primary comparison; default: all seeds
    also: [k3, route_agreement]            # late means that are compared as well: study/measures.py lists them
    parallel: 2                            # runs at a time
    published:                             # numbers of a paper, shown beside the study's
      source: "arXiv 2602.10693 v3, Table 2"
      values: {vespo: {N=4: 70.0}, grpo: {N=4: 54.0}}

A study of one axis may say `variants:` instead of `axes:`. `study/tuning.py` describes `tune:`, which chooses a value
for each variant beforehand, on other seeds.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.loader import load_recipe
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.study.measures import LATE

_LEVEL = re.compile(r"[A-Za-z0-9_=+.-]+")
_PRIMARY = re.compile(r"(\S+) (>|vs) (\S+)(?: at (.+))?")


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    levels: tuple[str, ...]
    """Of every axis, in their order."""
    seed: int
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        return "/".join((*self.levels, f"seed_{self.seed}"))


@dataclass(frozen=True)
class Published:
    """Numbers of a paper in the study's own layout, in per cent."""

    source: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)

    def value(self, levels: tuple[str, ...]) -> float | None:
        """What the paper says of this cell; None where it says nothing."""
        found: Any = self.values
        for level in levels:
            found = found.get(level) if isinstance(found, Mapping) else None
        return None if found is None or isinstance(found, Mapping) else float(found)


@dataclass(frozen=True)
class Primary:
    """A comparison of accuracies that was stated before the study was run."""

    variant: str
    against: str
    setting: tuple[str, ...]
    expects_more: bool
    """Whether the variant is expected to be higher; else nothing is expected."""


@dataclass(frozen=True)
class Tuning:
    """A key whose value is chosen for each variant before the study; see `study.tuning`."""

    key: str
    values: tuple[float | int | str, ...]
    seeds: tuple[int, ...]
    at: tuple[str, ...]
    """A level of each axis but the first."""


@dataclass(frozen=True)
class Study:
    """See the module."""

    name: str
    base: Path
    output: Path
    seeds: tuple[int, ...]
    axes: Mapping[str, Mapping[str, tuple[str, ...]]]
    baseline: str
    accuracy: str
    last_evaluations: int = 1
    """A run's accuracy is the mean of so many."""
    also: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    parallel: int = 1
    published: Published = field(default_factory=Published)
    primary: tuple[Primary, ...] = ()
    baselines: Mapping[str, str] = field(default_factory=dict)
    """Levels of the first axis that are compared with another one than `baseline`."""
    exploratory_seeds: tuple[int, ...] | None = None
    """Of cells that are in no primary comparison; None: all seeds."""
    tuning: Tuning | None = None

    def baseline_of(self, variant: str) -> str | None:
        """What a level of the first axis is compared with; None for `baseline` itself."""
        found = self.baselines.get(variant, self.baseline)
        return None if found == variant else found

    @property
    def settings(self) -> list[tuple[str, ...]]:
        """Levels of all axes but the first: within one of them the first axis' levels are compared."""
        return list(itertools.product(*list(self.axes.values())[1:]))

    @property
    def variants(self) -> list[str]:
        """Levels of the first axis."""
        return list(next(iter(self.axes.values())))

    def with_seeds(self, seeds: Sequence[int]) -> Study:
        """The part of it that has these seeds; what it chooses beforehand stays whole.

        Raises:
            UserError: the study has no such seed.
        """
        if not seeds or set(seeds) - set(self.seeds):
            raise UserError(f"has no seeds {list(seeds)}", where=self.name, expected=f"some of {list(self.seeds)}")
        return replace(self, seeds=tuple(seed for seed in self.seeds if seed in seeds))

    def cells(self) -> list[Cell]:
        """Every run, seeds outermost and a seed's primary ones first: a study stopped half-way has whole seeds."""
        cells = []
        stated = {(name, *each.setting) for each in self.primary for name in (each.variant, each.against)}
        explored = self.seeds if self.exploratory_seeds is None else self.exploratory_seeds
        for seed in self.seeds:
            for levels in sorted(itertools.product(*self.axes.values()), key=lambda levels: levels not in stated):
                if levels not in stated and seed not in explored:
                    continue
                chosen = [text for axis, level in zip(self.axes.values(), levels, strict=True) for text in axis[level]]
                cells.append(Cell(levels, seed, (*self.overrides, *chosen, f"grpo.seed={seed}")))
        return cells

    def folder(self, cell: Cell) -> Path:
        """Its run directory."""
        return self.output / cell.name

    def recipe(self, cell: Cell, extra: tuple[str, ...] = ()) -> Recipe:
        """Its recipe; a run that was stopped is gone on with."""
        place = [
            f"exp_manager.exp_dir={self.output}",
            f"exp_manager.name={'/'.join(cell.levels)}",
            f"exp_manager.version=seed_{cell.seed}",
            "exp_manager.resume_if_exists=true",
        ]
        return load_recipe(self.base, [*cell.overrides, *extra, *place])


def load_study(path: str | Path) -> Study:
    """Read and check a study.

    Raises:
        UserError: no such file, not YAML, a key that is missing, unknown or of the wrong kind.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=str(path), expected="a study's YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"is not YAML ({error})", where=str(path)) from None
    return _Reader(path, content).study()


class _Reader:
    """Takes a mapping apart, naming file and key of what is wrong."""

    def __init__(self, path: Path, content: Any) -> None:
        self.path = path
        self.content = dict(content) if isinstance(content, Mapping) else self.fail("", "a mapping")

    def study(self) -> Study:
        axes = self.axes()
        baseline = str(self.take("baseline", str, next(iter(next(iter(axes.values()))))))
        if baseline not in next(iter(axes.values())):
            self.fail("baseline", f"one of {', '.join(next(iter(axes.values())))}")
        baselines = {str(level): str(other) for level, other in self.take("baselines", Mapping, {}).items()}
        if unknown := {*baselines, *baselines.values()} - set(next(iter(axes.values()))):
            self.fail("baselines", f"pairs of {', '.join(next(iter(axes.values())))}, not {min(unknown)}")
        seeds = self.seeds("seeds", self.take("seeds", list, [1, 2, 3]))
        explored = self.take("exploratory_seeds", list, list(seeds))
        if set(explored) - set(seeds):
            self.fail("exploratory_seeds", f"some of the seeds {list(seeds)}")
        published = self.take("published", Mapping, {})
        if set(published) - {"source", "values"} or not isinstance(published.get("values", {}), Mapping):
            self.fail("published", "`source` and `values`")
        study = Study(
            name=self.take("name", str),
            base=self.path.parent / self.take("base", str),
            output=Path(self.take("output", str)),
            seeds=seeds,
            axes=axes,
            baseline=baseline,
            accuracy=self.take("accuracy", str),
            last_evaluations=max(1, self.take("last_evaluations", int, 1)),
            also=tuple(map(str, self.take("also", list, []))),
            overrides=self.texts("overrides", self.take("overrides", list, [])),
            parallel=max(1, self.take("parallel", int, 1)),
            published=Published(**published),
            baselines=baselines,
            primary=tuple(self.primary(str(text), axes) for text in self.take("primary", list, [])),
            exploratory_seeds=None if explored == list(seeds) else tuple(explored),
            tuning=self.tuning(axes, seeds) if "tune" in self.content else None,
        )
        if len(set(study.primary)) < len(study.primary):
            self.fail("primary", "different comparisons")
        if unknown := set(study.also) - set(LATE):
            self.fail("also", f"some of {', '.join(LATE)}, not {min(unknown)}")
        if self.content:
            self.fail(next(iter(self.content)), "no such key; see vespo_megatron/study/spec.py")
        return study

    def axes(self) -> dict[str, dict[str, tuple[str, ...]]]:
        key = "variants" if "variants" in self.content else "axes"
        raw = self.take(key, Mapping)
        raw = {"variant": raw} if key == "variants" else raw
        axes: dict[str, dict[str, tuple[str, ...]]] = {}
        for axis, levels in raw.items():
            if not isinstance(levels, Mapping) or not levels:
                self.fail(f"{key}.{axis}", "names of levels with lists of key=value")
            for level in levels:
                if not _LEVEL.fullmatch(str(level)):
                    self.fail(f"{key}.{axis}", f"names of letters, digits and _=+.-, not {level!r}")
            axes[str(axis)] = {
                str(level): self.texts(f"{key}.{axis}.{level}", texts or []) for level, texts in levels.items()
            }
        return axes or self.fail(key, "at least one axis")

    def primary(self, text: str, axes: Mapping[str, Mapping[str, Any]]) -> Primary:
        variants, *others = axes.values()
        expected = f"`VARIANT > VARIANT at LEVEL, …` (or vs), not {text!r}"
        found: re.Match[str] = _PRIMARY.fullmatch(text) or self.fail("primary", expected)
        variant, sign, against, levels = found.groups()
        if variant == against or {variant, against} - set(variants):
            self.fail("primary", f"two of {', '.join(variants)} in {text!r}")
        setting = tuple(levels.split(", ")) if levels else ()
        if len(setting) != len(others) or any(level not in axis for level, axis in zip(setting, others, strict=False)):
            self.fail("primary", f"after `at` a level of each of {len(others)} other axes, in their order, in {text!r}")
        return Primary(variant, against, setting, sign == ">")

    def tuning(self, axes: Mapping[str, dict[str, Any]], seeds: Sequence[int]) -> Tuning:
        raw = self.take("tune", Mapping)
        if set(raw) - {"at"} != {"key", "values", "seeds"}:
            self.fail("tune", "`key`, `values`, `seeds`, and `at` where there are further axes")
        values, at = raw["values"], raw.get("at", [])
        if not isinstance(values, list) or len(set(map(str, values))) < max(2, len(values)):
            self.fail("tune.values", "two different values or more")
        chosen_on = self.seeds("tune.seeds", raw["seeds"])
        if set(chosen_on) & set(seeds):
            self.fail("tune.seeds", "seeds that the study itself does not use")
        others = list(axes.values())[1:]
        if (
            not isinstance(at, list)
            or len(at) != len(others)
            or any(a not in o for a, o in zip(at, others, strict=True))
        ):
            self.fail("tune.at", f"a level of each of {len(others)} axes after the first, in their order")
        return Tuning(str(raw["key"]), tuple(values), chosen_on, tuple(at))

    def seeds(self, key: str, seeds: Any) -> tuple[int, ...]:
        whole = isinstance(seeds, list) and all(type(seed) is int for seed in seeds)
        if not whole or not seeds or len(set(seeds)) < len(seeds):
            self.fail(key, "different whole numbers")
        return tuple(seeds)

    def take(self, key: str, kind: type, *default: Any) -> Any:
        value = self.content.pop(key, *default) if default else self.content.pop(key, None)
        if not isinstance(value, kind):
            self.fail(key, f"a value of kind {kind.__name__}")
        return value

    def texts(self, key: str, values: Any) -> tuple[str, ...]:
        if not isinstance(values, list) or not all(isinstance(text, str) and "=" in text for text in values):
            self.fail(key, "a list of key=value")
        return tuple(values)

    def fail(self, key: str, expected: str) -> Any:
        raise UserError(
            "is missing or not usable" if key else "is not usable",
            where=f"{self.path}: {key}".rstrip(": "),
            expected=expected,
        )
