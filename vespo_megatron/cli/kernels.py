"""`vespo-megatron kernels`: φ(W) of objectives, drawn and tabulated."""

from __future__ import annotations

import argparse
from pathlib import Path

from vespo_megatron.cli.numbers import number, whole_number

COMPARED = "vespo,grpo,gspo,sapo"
LARGEST_SIGMA = 10.0
"""Of log W: beyond it the moments of W are not those of any sample."""
HELP = "φ(W) of the objectives, as a picture and a table"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--compare", help=f"objectives, separated by commas (default {COMPARED})")
    parser.add_argument("--figure", choices=["paper-2"], help="a picture of the VESPO paper, by its number")
    parser.add_argument("--output", type=Path, default=Path("kernels.png"), help="picture (default %(default)s)")
    parser.add_argument(
        "--sigma",
        type=number(0, LARGEST_SIGMA, above=True),
        default=1.0,
        help="W is log-normal: standard deviation of log W",
    )
    parser.add_argument(
        "--weights", type=Path, help="W instead of log-normal: a file of log W, one number per line (of responses)"
    )
    parser.add_argument(
        "--length",
        type=whole_number(1),
        default=1,
        help="tokens of a response, which share log W evenly (default %(default)s)",
    )


def run(parsed: argparse.Namespace) -> None:
    """Write the picture, print the table."""
    from vespo_megatron.errors import UserError
    from vespo_megatron.losses.phi_table import FIGURES, LOGARITHMIC, read_weights, run_kernels
    from vespo_megatron.losses.theory import log_normal_w

    w = log_normal_w(parsed.sigma) if parsed.weights is None else read_weights(parsed.weights)
    if parsed.figure is not None and parsed.compare is not None:
        raise UserError("is given with --figure, which says what is compared", where="--compare")
    compared = COMPARED if parsed.compare is None else parsed.compare
    names, axes = FIGURES.get(
        parsed.figure, ([name.strip() for name in compared.split(",") if name.strip()], LOGARITHMIC)
    )
    print(run_kernels(names, w=w, length=parsed.length, output=parsed.output, axes=axes))
    print(f"picture: {parsed.output}")
