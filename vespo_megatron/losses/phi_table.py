"""φ(W), surrogate f(W) and implicit proposal of any objectives, as a picture and a table (`vespo-megatron kernels`).

With `--compare vespo,grpo,gspo,sapo` it is the paper's Figure 2 from this project's own code.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from vespo_megatron.errors import UserError
from vespo_megatron.losses.registry import get_objective
from vespo_megatron.losses.theory import objective_phi, proposal, surrogate, vespo_k

COLUMNS = ("objective", "A", "φ(.1)", "φ(.5)", "φ(1)", "φ(2)", "φ(4)", "Z = E φ", "E_Q[W]", "ESS", "E φ²", "Z·K·C")
TABLE_W = (0.1, 0.5, 1.0, 2.0, 4.0)


def read_weights(path: Path) -> Tensor:
    """W from a file with one log W per line: float64 [n]. Raises UserError for what is no number."""
    values = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.strip():
            try:
                values.append(float(line))
            except ValueError as error:
                raise UserError(f"{line!r} is no number", where=f"{path}:{number}", expected="log W") from error
    if not values:
        raise UserError("is empty", where=str(path), expected="one log W per line")
    return torch.tensor(values, dtype=torch.float64).clamp(-20, 20).exp()


def run_kernels(names: list[str], *, w: Tensor, length: int = 1, output: Path | None = None) -> str:
    """Draw φ and f of `names` for both signs of A to `output` (PNG), and return the table as Markdown.

    Args:
        w: float64 [n], W of responses of the behaviour policy, for the proposal's moments.
        length: tokens of a response.

    Raises:
        UserError: unknown objective (the nearest is named).
    """
    for name in names:
        get_objective(name)
    if output is not None:
        draw(names, length, output)
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


def draw(names: list[str], length: int, output: Path) -> None:
    """φ above, f below (f(1) = 0), A ≥ 0 left, A < 0 right; W on a logarithmic axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    w = torch.logspace(-1.5, 1.0, 1200, dtype=torch.float64)
    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharex=True)
    for column, positive in enumerate((True, False)):
        for name in names:

            def phi(at: Tensor, name: str = name, positive: bool = positive) -> Tensor:
                return objective_phi(name, at, positive=positive, length=length)

            axes[0, column].plot(w, phi(w), label=name)
            axes[1, column].plot(w, surrogate(phi, w), label=name)
        axes[0, column].set_title("A ≥ 0" if positive else "A < 0")
        axes[0, column].set_ylim(-0.05, 2.5)
        axes[1, column].set_ylim(-3, 3)
        axes[1, column].set_xlabel("W")
        axes[1, column].set_xscale("log")
        for row in (0, 1):
            axes[row, column].axvline(1.0, color="grey", linewidth=0.5)
            axes[row, column].grid(alpha=0.3)
    axes[0, 0].set_ylabel("φ(W): coefficient of A·∇log π")
    axes[1, 0].set_ylabel("f(W): surrogate, f(1) = 0")
    axes[0, 0].legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150)
