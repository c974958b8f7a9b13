"""`vespo-megatron predict`: what φ will be, before a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from vespo_megatron.cli.numbers import number, whole_numbers
from vespo_megatron.cli.shared import add_recipe

LARGEST_K3 = 1e3
"""Nats per token: far beyond any two policies, and short of what a float cannot multiply."""
MOST_TOKENS = 1 << 20
"""Of a response, all of whose log-ratios are held for an objective that looks at tokens."""
HELP = "φ, ESS and the share of responses with φ > ½ by length, for each behaviour policy"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_recipe(parser)
    k3 = number(0, LARGEST_K3)
    parser.add_argument("--k3", type=k3, metavar="K", help="KL per token of engine and trainer")
    parser.add_argument("--k2", type=k3, metavar="K", help="with --k3: mean(d²/2) per token, for heavy tails")
    parser.add_argument("--staleness-k3", type=k3, metavar="K", help="KL per token of π_θ and π_old (default 0)")
    parser.add_argument(
        "--from", dest="origin", type=Path, metavar="RUN", help="measured: the directory of a run, or of mismatch"
    )
    parser.add_argument(
        "--tokens", type=whole_numbers(1, MOST_TOKENS), metavar="N,…", help="response lengths (default: by the recipe)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="picture to write (.png, .svg or .pdf)")


def run(parsed: argparse.Namespace) -> None:
    """Print the table, write the picture."""
    from vespo_megatron.errors import UserError
    from vespo_megatron.losses.predicted import Divergence
    from vespo_megatron.outputs import PICTURES, check_file
    from vespo_megatron.plan import prediction, prediction_figure
    from vespo_megatron.plan.measured_mismatch import read_measured
    from vespo_megatron.recipe.loader import load_recipe

    if parsed.k3 is not None and parsed.origin is not None:
        raise UserError("both are given", where="--k3 and --from", expected="one of them")
    if parsed.k2 is not None and parsed.k3 is None:
        raise UserError("is given alone", where="--k2", expected="--k3 with it")
    if parsed.out is not None:
        check_file(parsed.out, "--out", PICTURES)
    recipe = load_recipe(parsed.recipe, parsed.overrides)
    replay = "R3" if recipe.policy.router_replay.mode == "R3" else "none"
    measured = read_measured(parsed.origin, replay=replay) if parsed.origin is not None else None
    made = prediction.scenario(
        recipe,
        engine=None if parsed.k3 is None else Divergence(parsed.k3, parsed.k2),
        staleness=None if parsed.staleness_k3 is None else Divergence(parsed.staleness_k3),
        measured=measured,
    )
    lengths = parsed.tokens or prediction.default_lengths(recipe.policy.generation.max_new_tokens)
    parts = ["\n".join(made.lines), prediction.table(made, lengths, measured.lengths if measured else None)]
    if measured is not None and (check := prediction.check_table(measured)) is not None:
        parts.append(check)
    if parsed.out is not None:
        prediction_figure.draw(made, max(lengths), parsed.out)
        parts.append(f"picture: {parsed.out}")
    print("\n\n".join(parts))
