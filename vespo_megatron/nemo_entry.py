"""The same recipes under NeMo's `hydra_runner`, for those whose jobs are started that way::

    python -m vespo_megatron.nemo_entry --config-path=examples/tiny_moe --config-name=vespo grpo.seed=7

Needs the `nemo` extra. Hydra gives `defaults:` a meaning of its own, so the recipe's chain of defaults is resolved
before it sees the file; the overrides are Hydra's, in its grammar. Every rank of torchrun may run this command.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vespo_megatron.errors import UserError
from vespo_megatron.installed import what_to_install

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from vespo_megatron.recipe.schema import Recipe


def check_exp_manager(recipe: Recipe) -> None:
    """`exp_manager:` must be what NeMo's own `ExpManagerConfig` takes. Raises UserError."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        from nemo.utils.exp_manager import ExpManagerConfig
    except ImportError as error:
        raise UserError(
            f"NeMo cannot be imported ({error})", where="nemo_entry", fix="pip install 'vespo-megatron[nemo]'"
        ) from None
    try:
        OmegaConf.merge(OmegaConf.structured(ExpManagerConfig), OmegaConf.create(recipe.exp_manager.model_dump()))
    except OmegaConfBaseException as error:
        raise UserError(str(error).splitlines()[0], where="exp_manager", expected="NeMo's ExpManagerConfig") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `train` on what Hydra composes; returns the exit status, as `cli.main` does."""
    from vespo_megatron.cli import main as command_line

    given = list(sys.argv[1:] if arguments is None else arguments)
    with tempfile.TemporaryDirectory(prefix="vespo_nemo_") as folder:
        try:
            path = _composed_recipe(given, Path(folder))
        except UserError as error:
            print(f"vespo-megatron: {error}", file=sys.stderr)
            return 2
        except ModuleNotFoundError as error:
            if (said := what_to_install("nemo_entry", error)) is None:
                raise
            print(f"vespo-megatron: {said}", file=sys.stderr)
            return 2
        return command_line(["train", str(path)])


def _composed_recipe(given: list[str], folder: Path) -> Path:
    """Write the recipe that Hydra composes of these arguments, checked."""
    rest = _with_resolved_recipe(given, folder)
    from vespo_megatron.recipe.loader import plain, recipe_of, save_recipe

    recipe = recipe_of(plain(_compose(rest), resolve=True), "Hydra's configuration")
    check_exp_manager(recipe)
    save_recipe(recipe, folder / "composed.yaml")
    return folder / "composed.yaml"


def _with_resolved_recipe(given: list[str], folder: Path) -> list[str]:
    """Write the recipe that the arguments name, defaults resolved, and name that one instead."""
    parser = argparse.ArgumentParser(prog="vespo_megatron.nemo_entry")
    parser.add_argument("--config-path", "-cp", default=".", help="folder of the recipe")
    parser.add_argument("--config-name", "-cn", required=True, help="its name, with or without .yaml")
    options, rest = parser.parse_known_args(given)
    from vespo_megatron.recipe.loader import load_recipe, save_recipe

    name = options.config_name
    recipe = Path(options.config_path) / (name if name.endswith((".yaml", ".yml")) else f"{name}.yaml")
    save_recipe(load_recipe(recipe), folder / "recipe.yaml")
    return [f"--config-path={folder}", "--config-name=recipe", *rest]


def _compose(arguments: list[str]) -> DictConfig:
    """What NeMo's runner hands to the function it decorates."""
    try:
        from nemo.core.config import hydra_runner
    except ImportError as error:
        raise UserError(
            f"NeMo cannot be imported ({error})", where="nemo_entry", fix="pip install 'vespo-megatron[nemo]'"
        ) from None
    composed: list[DictConfig] = []
    own, sys.argv = sys.argv, [sys.argv[0], *arguments]  # Hydra reads nothing else
    try:
        hydra_runner()(lambda config: composed.append(config))()
    finally:
        sys.argv = own
    if not composed:  # --help, --cfg and the like have printed what was asked for
        raise SystemExit(0)
    if len(composed) > 1:
        raise UserError("composes several configurations", where="--multirun", fix="use vespo-megatron compare")
    return composed[0]


if __name__ == "__main__":
    sys.exit(main())
