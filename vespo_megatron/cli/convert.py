"""`vespo-megatron convert`: between Hugging Face and Megatron checkpoints."""

from __future__ import annotations

import argparse
import os

HELP = "a Hugging Face folder as a Megatron distributed checkpoint, or the other way round"


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


def run(parsed: argparse.Namespace) -> None:
    """Run the command."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # it is made on the CPU, which megatron-core only does where it sees no GPU
    from vespo_megatron.launch.convert import convert

    done = convert(parsed.source, parsed.target, model=parsed.model, layout=parsed.layout)
    if os.environ.get("RANK", "0") == "0":
        print(done)
