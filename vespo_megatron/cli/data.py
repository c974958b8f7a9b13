"""`vespo-megatron data`: public problem sets, and what a recipe's prompts are."""

from __future__ import annotations

import argparse

from vespo_megatron.cli.numbers import whole_number
from vespo_megatron.cli.shared import add_recipe

HELP = "public problem sets, and what a recipe's prompts are"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The actions and their options."""
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    prepare = actions.add_parser(
        "prepare", help="a public set as parquet in veRL's schema, from the hub or a local copy"
    )
    prepare.add_argument("sets", nargs="+", metavar="SET", help="as in dapo_math aime24 math500; `all` for each")
    prepare.add_argument("--output", default="data", metavar="DIR", help="where <set>.parquet goes (default data)")
    prepare.add_argument("--from", dest="local", metavar="PATH", help="a local copy of the set: a file or a folder")
    prepare.add_argument("--revision", help="commit or tag on the hub (default the newest)")
    prepare.add_argument("--since", metavar="DAY", help="of LiveCodeBench: problems from this day on, as in 2025-01-31")
    prepare.add_argument("--until", metavar="DAY", help="of LiveCodeBench: problems up to this day")
    prepare.add_argument("--force", action="store_true", help="make it anew")
    prepare.set_defaults(action=_prepare)
    show = actions.add_parser("show", help="one prompt of a recipe, as the model sees it")
    add_recipe(show)
    show.add_argument("--row", type=whole_number(0), default=0, metavar="N", help="its number in the set (default 0)")
    show.add_argument("--set", metavar="NAME", help="the set's name, or its file's (default the first of training)")
    show.set_defaults(action=_show)
    stats = actions.add_parser(
        "stats", help="rows, sources, lengths, duplicates of every set, and what cannot be scored"
    )
    add_recipe(stats)
    stats.set_defaults(action=_statistics)


def run(parsed: argparse.Namespace) -> None:
    """The action that was named."""
    parsed.action(parsed)


def _prepare(parsed: argparse.Namespace) -> None:
    from vespo_megatron.data.public.prepare import prepare
    from vespo_megatron.data.public.sets import SETS

    for name in SETS if parsed.sets == ["all"] else parsed.sets:
        path = prepare(
            name,
            parsed.output,
            local=parsed.local,
            revision=parsed.revision,
            since=parsed.since,
            until=parsed.until,
            force=parsed.force,
        )
        print(path, flush=True)


def _show(parsed: argparse.Namespace) -> None:
    from vespo_megatron.launch.data_report import show
    from vespo_megatron.recipe.loader import load_recipe

    print(show(load_recipe(parsed.recipe, parsed.overrides), parsed.row, parsed.set))


def _statistics(parsed: argparse.Namespace) -> None:
    from vespo_megatron.launch.data_report import statistics
    from vespo_megatron.recipe.loader import load_recipe

    print(statistics(load_recipe(parsed.recipe, parsed.overrides)))
