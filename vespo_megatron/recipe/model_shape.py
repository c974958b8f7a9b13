"""The one reader of a Hugging Face `config.json`. Standard library alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vespo_megatron.errors import UserError
from vespo_megatron.families.config_keys import ConfigKeys
from vespo_megatron.families.family import family_of, known_families
from vespo_megatron.families.shape import ModelShape
from vespo_megatron.json_text import parse_json


def read_shape(model_folder: str | Path) -> ModelShape:
    """Read and check `<model_folder>/config.json`.

    Raises:
        UserError: no such file, an unknown family, a key is missing or holds what it cannot, or a feature this project
            does not train.
    """
    path = Path(model_folder) / "config.json"
    try:
        config = parse_json(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"cannot be read ({error.strerror})",
            where=str(path),
            expected="a Hugging Face model folder",
            fix="check policy.model_name (relative paths start at the current directory), or prepare the model first",
        ) from None
    except ValueError as error:
        raise UserError(f"is not JSON ({error})", where=str(path)) from None
    if not isinstance(config, dict):
        raise UserError("is not a mapping", where=str(path), expected="a Hugging Face model configuration")
    return shape_of_config(config, where=str(path))


def shape_of_config(config: Mapping[str, Any], *, where: str = "config.json") -> ModelShape:
    """The shape that the keys of a `config.json` describe; raises `UserError` as `read_shape` does, naming `where`."""
    model_type = config.get("model_type")
    family = family_of(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise UserError(f"has model_type {model_type!r}", where=where, expected=f"one of {', '.join(known_families())}")
    return replace(family.read(ConfigKeys(config, where)), names=family.names)
