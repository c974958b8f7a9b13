"""φ(W), surrogate f(W) and implicit proposal of any objectives, as a picture and a table (`vespo-megatron kernels`).

`--figure paper-2` is the paper's Figure 2 from this project's own code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vespo_megatron.errors import UserError
from vespo_megatron.losses.registry import get_objective
from vespo_megatron.losses.theory import SURROGATE_POINTS, objective_phi, proposal, surrogate, vespo_k
from vespo_megatron.outputs import PICTURES, check_file, written

COLUMNS = ("objective", "A", "φ(.1)", "φ(.5)", "φ(1)", "φ(2)", "φ(4)", "Z = E φ", "E_Q[W]", "ESS", "E φ²", "Z·K·C")
MOST_TOKENS = 1 << 26
"""Of all responses together: half a GiB in each of about ten arrays."""
TABLE_W = (0.1, 0.5, 1.0, 2.0, 4.0)


def read_weights(path: Path) -> Tensor:
    """W from a file with one log W per line: float64 [n].

    Raises:
        UserError: a file that cannot be read, and a line that is no finite number.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read: {error}", where=str(path), expected="a file of one log W per line") from None
    values = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = float(line)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise UserError(f"{line.strip()!r} is no finite number", where=f"{path}:{number}", expected="log W")
        values.append(value)
    if not values:
        raise UserError("is empty", where=str(path), expected="one log W per line")
    return torch.tensor(values, dtype=torch.float64).clamp(-20, 20).exp()


@dataclass(frozen=True)
class Axes:
    """How W is drawn, and where f is 0."""

    w: Tensor
    """float64 [points]"""
    scale: str
    f_at_zero: float
    """The W at which f is 0."""
    f_limits: tuple[float, float]


LOGARITHMIC = Axes(torch.logspace(-1.5, 1.0, 1200, dtype=torch.float64), "log", 1.0, (-3.0, 3.0))
LINEAR = Axes(torch.linspace(1e-3, 3.0, 1200, dtype=torch.float64), "linear", 1e-6, (0.0, 3.0))
FIGURES: dict[str, tuple[list[str], Axes]] = {"paper-2": (["sapo", "vespo", "grpo"], LINEAR)}
"""Pictures by name. paper-2: Figure 2 of arXiv 2602.10693 v3: a linear W, f as it is with f(0) = 0, of SAPO, VESPO and
the hard clip (`grpo`); its axes and curves are as described to this project, not read at the source."""


def run_kernels(
    names: list[str], *, w: Tensor, length: int = 1, output: Path | None = None, axes: Axes = LOGARITHMIC
) -> str:
    """Draw φ and f of `names` for both signs of A to `output`, and return the table as Markdown.

    Args:
        w: float64 [n], W of responses of the behaviour policy, for the proposal's moments.
        length: tokens of a response.

    Raises:
        UserError: no objective, or an unknown one (the nearest is named); a length below 1, or above what can be held
            of so many responses; an `output` that is no .png, .svg or .pdf or cannot be written.
    """
    if not names:
        raise UserError("names no objective", where="--compare", expected="for example vespo,grpo")
    if length < 1:
        raise UserError(f"is {length}", where="--length", expected="the tokens of a response, at least 1")
    responses = max(len(w), SURROGATE_POINTS)
    if length * responses > MOST_TOKENS:
        raise UserError(
            f"is {length}, of {responses} responses",
            where="--length",
            expected=f"at most {MOST_TOKENS // responses} for so many responses",
        )
    for name in names:
        get_objective(name)
    if output is not None:
        check_file(output, "--output", PICTURES)
        draw(names, length, output, axes)
    rows = [COLUMNS, tuple("---" for _ in COLUMNS)]
    for name in names:
        for positive in (True, False):
            values = objective_phi(name, torch.tensor(TABLE_W), positive=positive, length=length)
            k = vespo_k(*vespo_constants(positive)) if name == "vespo" else None
            moments = proposal(w, objective_phi(name, w, positive=positive, length=length), k=k)
            numbers = [*values.tolist(), moments.z, moments.mean_w, moments.ess, moments.second_moment]
            bound = "" if moments.bound is None else f"{moments.bound:.4f}"
            rows.append((name, "≥ 0" if positive else "< 0", *(f"{v:.4f}" for v in numbers), bound))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def vespo_constants(positive: bool) -> tuple[float, float]:
    """The deployed (c1, c2), read from the objective's defaults."""
    defaults = get_objective("vespo").hyperparameters
    sign = "pos" if positive else "neg"
    return defaults[f"c1_{sign}"], defaults[f"c2_{sign}"]


def draw(names: list[str], length: int, output: Path, drawn: Axes = LOGARITHMIC) -> None:
    """φ above, f below, A ≥ 0 left, A < 0 right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    w, zero = drawn.w, torch.tensor([drawn.f_at_zero], dtype=torch.float64)
    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharex=True)
    for column, positive in enumerate((True, False)):
        for name in names:

            def phi(at: Tensor, name: str = name, positive: bool = positive) -> Tensor:
                return objective_phi(name, at, positive=positive, length=length)

            axes[0, column].plot(w, phi(w), label=name)
            axes[1, column].plot(w, surrogate(phi, w) - surrogate(phi, zero), label=name)
        axes[0, column].set_title("A ≥ 0" if positive else "A < 0")
        axes[0, column].set_ylim(-0.05, 2.5)
        axes[1, column].set_ylim(*drawn.f_limits)
        axes[1, column].set_xlabel("W")
        axes[1, column].set_xscale(drawn.scale)
        for row in (0, 1):
            axes[row, column].axvline(1.0, color="grey", linewidth=0.5)
            axes[row, column].grid(alpha=0.3)
    axes[0, 0].set_ylabel("φ(W): coefficient of A·∇log π")
    axes[1, 0].set_ylabel(f"f(W): surrogate, f({drawn.f_at_zero:.0f}) = 0")
    axes[0, 0].legend()
    with written(output, "--output"):
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=150)
