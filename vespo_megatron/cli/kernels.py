"""`vespo-megatron kernels`: φ(W) of objectives, drawn and tabulated."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "φ(W) of the objectives, as a picture and a table"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "--compare", default="vespo,grpo,gspo,sapo", help="objectives, separated by commas (default %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path("kernels.png"), help="picture (default %(default)s)")
    parser.add_argument("--sigma", type=float, default=1.0, help="W is log-normal: standard deviation of log W")
    parser.add_argument(
        "--weights", type=Path, help="W instead of log-normal: a file of log W, one number per line (of responses)"
    )
    parser.add_argument(
        "--length", type=int, default=1, help="tokens of a response, which share log W evenly (default %(default)s)"
    )


def run(parsed: argparse.Namespace) -> None:
    """Write the picture, print the table."""
    from vespo_megatron.losses.phi_table import read_weights, run_kernels
    from vespo_megatron.losses.theory import log_normal_w

    w = log_normal_w(parsed.sigma) if parsed.weights is None else read_weights(parsed.weights)
    names = [name.strip() for name in parsed.compare.split(",") if name.strip()]
    print(run_kernels(names, w=w, length=parsed.length, output=parsed.output))
    print(f"picture: {parsed.output}")
