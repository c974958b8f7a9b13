"""`vespo-megatron recipe`: look at recipes, check them, and what a recipe may say."""

from __future__ import annotations

import argparse
import json
import sys

from vespo_megatron.cli.shared import add_recipe

HELP = "look at recipes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The actions and their options."""
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    show = actions.add_parser("show", help="every key with its value, defaults and overrides applied")
    add_recipe(show)
    show.set_defaults(action=_show)
    check = actions.add_parser("check", help="everything that can be found wrong without starting a process")
    add_recipe(check)
    check.add_argument("--from", dest="origin", choices=["nemo-rl"], help="the file is another project's recipe")
    check.add_argument("--output", metavar="FILE", help="with --from: write what carries over as a recipe")
    check.set_defaults(action=_check)
    diff = actions.add_parser("diff", help="the keys in which two recipes differ")
    diff.add_argument("left", metavar="RECIPE")
    diff.add_argument("right", metavar="RECIPE")
    diff.set_defaults(action=_diff)
    keys = actions.add_parser("keys", help="every key: what it takes, its default and its meaning")
    keys.add_argument("filter", nargs="?", default="", help="only keys that contain this")
    keys.set_defaults(action=_keys)
    schema = actions.add_parser("schema", help="a JSON Schema of recipe files, for editors")
    schema.set_defaults(action=_schema)


def run(parsed: argparse.Namespace) -> None:
    """The action that was named."""
    parsed.action(parsed)


def _show(parsed: argparse.Namespace) -> None:
    from vespo_megatron.recipe.loader import load_recipe, to_yaml
    from vespo_megatron.rollout_sglang.api_key import hide_api_key

    print(to_yaml(hide_api_key(load_recipe(parsed.recipe, parsed.overrides))), end="")


def _check(parsed: argparse.Namespace) -> None:
    from vespo_megatron.errors import UserError
    from vespo_megatron.launch import preflight
    from vespo_megatron.recipe.loader import load_recipe

    if parsed.origin:
        from vespo_megatron.recipe.nemo_rl_report import check

        print(check(parsed.recipe, parsed.output))
        return
    if parsed.output is not None:
        raise UserError("is given without --from: nothing would be written", where="--output")
    recipe = load_recipe(parsed.recipe, parsed.overrides)
    warnings = preflight.check(recipe) + preflight.warnings(recipe)
    for warning in warnings:
        print(f"vespo-megatron: warning: {warning}", file=sys.stderr)
    print(
        f"{parsed.recipe}: "
        + (f"nothing wrong found, {len(warnings)} to look at" if warnings else "nothing wrong found")
    )


def _diff(parsed: argparse.Namespace) -> None:
    from vespo_megatron.recipe.loader import differences, load_recipe

    for name, (left, right) in differences(load_recipe(parsed.left), load_recipe(parsed.right)).items():
        print(f"{name}: {left!r} -> {right!r}")


def _keys(parsed: argparse.Namespace) -> None:
    from vespo_megatron.recipe.documentation import documentation

    for name, meaning in documentation().items():
        if parsed.filter in name:
            print(f"{name}: {meaning}" if meaning else name)


def _schema(_parsed: argparse.Namespace) -> None:
    from vespo_megatron.recipe.json_schema import json_schema

    print(json.dumps(json_schema(), indent=1, ensure_ascii=False))
