"""`vespo-megatron data`: public problem sets."""

from __future__ import annotations

import argparse

HELP = "public problem sets"


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
    prepare.add_argument("--force", action="store_true", help="make it anew")
    prepare.set_defaults(action=_prepare)


def run(parsed: argparse.Namespace) -> None:
    """The action that was named."""
    parsed.action(parsed)


def _prepare(parsed: argparse.Namespace) -> None:
    from vespo_megatron.data.public.prepare import prepare
    from vespo_megatron.data.public.sets import SETS

    for name in SETS if parsed.sets == ["all"] else parsed.sets:
        print(
            prepare(name, parsed.output, local=parsed.local, revision=parsed.revision, force=parsed.force), flush=True
        )
