"""What the VESPO paper measures and reports: benchmarks and averages of its tables. The only home of its numbers.

Source: arXiv 2602.10693 v3 (8 May 2026); averages of Tables 1 to 4, protocol of section 4 and appendix D. Version 1 has
others. The paper's numbers for single benchmarks are not here.
"""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = "arXiv 2602.10693 v3"
SAMPLING = (
    "the paper's temperature and top-p for its tables are not known here; its scripts validate with temperature 1, "
    "top-p 0.7"
)
"""`val_kwargs` of recipe/vespo/run/sync/vespo_N_8.sh in FloyedShen/VESPO."""


@dataclass(frozen=True)
class Benchmark:
    """A set, by the name that it is prepared under, and what is measured on it."""

    name: str
    title: str
    samples: int
    """Responses per problem."""
    pass_at: int | None = None
    """k of pass@k; None: avg@samples."""

    @property
    def measure(self) -> str:
        """As in avg@32."""
        return f"pass@{self.pass_at}" if self.pass_at else f"avg@{self.samples}"


@dataclass(frozen=True)
class Reported:
    """One of the paper's averages, in percent."""

    model: str
    objective: str
    """As recipes name it (`loss_fn.name`)."""
    updates: int | None
    """N, updates per rollout batch; None where the table does not say."""
    average: float


@dataclass(frozen=True)
class Table:
    """A table of the paper."""

    about: str
    benchmarks: tuple[Benchmark, ...]
    rows: tuple[Reported, ...]
    notes: tuple[str, ...] = ()
    """What the paper leaves open, and how it is answered here."""


_MATHEMATICS = (
    Benchmark("aime24", "AIME24", 32),
    Benchmark("aime25", "AIME25", 32),
    Benchmark("amc23", "AMC23", 16),
    Benchmark("math500", "MATH-500", 4),
)
_CODE = (
    Benchmark("humaneval_plus", "HumanEval+", 10, pass_at=10),
    Benchmark("mbpp_plus", "MBPP+", 10, pass_at=10),
    Benchmark("livecodebench_v6", "LiveCodeBench v6", 10, pass_at=10),
)
_LLAMA, _DENSE, _MOE = "Llama-3.2-3B-Instruct", "Qwen3-8B-Base", "Qwen3-30B-A3B-Base"


def _rows(model: str, updates: int | None, **averages: float) -> tuple[Reported, ...]:
    return tuple(Reported(model, objective, updates, average) for objective, average in averages.items())


TABLES = {
    1: Table(
        "three models on DAPO-Math, N = 8",
        _MATHEMATICS,
        (
            *_rows(_LLAMA, 8, grpo=26.8, gspo=26.7, sapo=24.5, vespo=28.3),
            *_rows(_DENSE, 8, grpo=54.6, gspo=56.4, sapo=60.9, vespo=60.9),
            *_rows(_MOE, 8, grpo=57.0, gspo=59.1, sapo=51.7, vespo=70.0),
        ),
    ),
    2: Table(
        "staleness",
        _MATHEMATICS,
        (
            *_rows(_MOE, 4, grpo=54.0, gspo=59.9, sapo=65.2, vespo=70.0),
            *_rows(_MOE, 8, grpo=57.0, gspo=59.1, sapo=51.7, vespo=70.0),
            *_rows(_MOE, 16, grpo=51.1, gspo=58.3, sapo=50.5, vespo=67.3),
            *_rows(_MOE, 32, grpo=52.4, gspo=50.0, sapo=20.9, vespo=64.5),
            *_rows(_MOE, 64, grpo=48.6, gspo=47.6, sapo=16.5, vespo=61.8),
        ),
    ),
    3: Table("other objectives, N = 8", _MATHEMATICS, _rows(_MOE, 8, topr=48.7, cispo=48.7, bapo=63.6)),
    4: Table(
        "code",
        _CODE,
        _rows(_MOE, None, grpo=60.9, gspo=59.7, sapo=61.8, vespo=63.0),
        (
            "How many responses the paper's pass@10 is of is not known here: 10 are drawn, the fewest that it needs.",
            "LiveCodeBench v6 is taken as the problems that version 6 added; those of --sets are what was asked.",
        ),
    ),
}
