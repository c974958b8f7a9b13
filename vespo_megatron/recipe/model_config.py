"""The one reader of a model's `config.json`; what it means is said where it is used. Standard library alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vespo_megatron.errors import UserError


def read_model_config(model_folder: str | Path) -> dict[str, Any]:
    """`config.json` of a Hugging Face folder. Raises UserError when it cannot be read."""
    path = Path(model_folder) / "config.json"
    try:
        config = json.loads(path.read_text())
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
    return config
