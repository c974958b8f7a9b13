"""`vespo-megatron serve`: a recipe's SGLang servers."""

from __future__ import annotations

import argparse

from vespo_megatron.cli.shared import add_recipe

HELP = "start a recipe's SGLang servers and keep them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_recipe(parser)


def run(parsed: argparse.Namespace) -> None:
    """Run the command."""
    from vespo_megatron.launch import launcher

    launcher.serve(parsed.recipe, parsed.overrides)
