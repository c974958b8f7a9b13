"""`vespo-megatron convert`: between Hugging Face and Megatron checkpoints."""

from __future__ import annotations

import argparse
import os

from vespo_megatron.cli.numbers import number, whole_number
from vespo_megatron.errors import UserError

HELP = "a Hugging Face folder as a Megatron distributed checkpoint, or the other way round; a dense model as an MoE"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("source", metavar="SOURCE", help="HF folder, run, checkpoint of a run, distributed checkpoint")
    parser.add_argument("target", metavar="TARGET", help="folder to make, in the other format")
    parser.add_argument("--model", metavar="DIR", help="HF folder with config.json, where the source's run has none")
    parser.add_argument(
        "--layout",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="under torchrun, how the processes share the model: expert_model_parallel_size=8",
    )

    parser.add_argument(
        "--upcycle",
        metavar="experts=E,topk=K",
        help="of a dense HF folder: an HF folder of an MoE whose experts are copies of its MLPs",
    )
    parser.add_argument(
        "--jitter",
        type=number(0, 1),
        metavar="SHARE",
        help="with --upcycle: noise on every expert but the first, as a share of each matrix's deviation (default 0)",
    )
    parser.add_argument("--seed", type=whole_number(0), metavar="N", help="with --upcycle: of routers and noise")


def run(parsed: argparse.Namespace) -> None:
    """Run the command."""
    if parsed.upcycle is not None:
        from vespo_megatron.launch.upcycle import numbers_of, upcycle

        experts, topk = numbers_of(parsed.upcycle)
        given = {name: value for name in ("jitter", "seed") if (value := getattr(parsed, name)) is not None}
        print(upcycle(parsed.source, parsed.target, experts=experts, topk=topk, **given))
        return
    for name in ("jitter", "seed"):
        if getattr(parsed, name) is not None:
            raise UserError("is for --upcycle", where=f"--{name}", fix="leave it out")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # it is made on the CPU, which megatron-core only does where it sees no GPU
    from vespo_megatron.launch.convert import convert

    done = convert(parsed.source, parsed.target, model=parsed.model, layout=parsed.layout)
    if os.environ.get("RANK", "0") == "0":
        print(done)
