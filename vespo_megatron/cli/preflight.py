"""`vespo-megatron preflight`: what of a recipe would fail on this node, before a job is queued."""

from __future__ import annotations

import argparse

from vespo_megatron.cli.shared import add_recipe

HELP = "what of a recipe would fail on this node: GPUs, memory, network, storage, versions"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_recipe(parser)
    parser.add_argument("--fake-gpu", metavar="GPUxN", help="judge by these cards, as in h100-80x8, not by this node's")
    parser.add_argument("--json", action="store_true", help="for programs")


def run(parsed: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    from vespo_megatron.doctor.command import show
    from vespo_megatron.doctor.recipe_checks import Node, examine
    from vespo_megatron.recipe.loader import load_recipe

    recipe = load_recipe(parsed.recipe, parsed.overrides)
    return show(examine(recipe, Node.of(parsed.fake_gpu)), as_json=parsed.json)
