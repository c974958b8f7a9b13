"""The servers' API key: from the recipe or the environment into this process's environment, and nowhere else.

Never in a saved recipe, a command line or a log. Child processes (torchrun's workers, the servers) inherit the
variable. Standard library alone: the servers' environment imports this.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vespo_megatron.recipe.schema import Recipe, SGLangConfig

VARIABLE = "VESPO_SGLANG_API_KEY"


def hide_api_key(recipe: Recipe) -> Recipe:
    """The recipe without its key, which is in the environment from now on: whatever is written of it lacks the key."""
    key = recipe.policy.generation.sglang_cfg.api_key
    if not key:
        return recipe
    os.environ[VARIABLE] = key
    return recipe.with_values({"policy.generation.sglang_cfg.api_key": None})


def api_key(config: SGLangConfig) -> str | None:
    """The recipe's key, else the environment's."""
    return config.api_key or os.environ.get(VARIABLE) or None


def take_from_environment() -> str | None:
    """The key, which later children of this process do not inherit."""
    return os.environ.pop(VARIABLE, None) or None
