"""A JSON Schema of recipe files, with which an editor completes and checks them: `vespo-megatron recipe schema`.

pydantic makes it from the recipe's schema. A file says a part of a recipe, so no key is required; it may start with
`defaults:`, write any value as an interpolation (`${grpo.seed}`), and say `_override_: true` in a mapping of free keys.
"""

from __future__ import annotations

from typing import Any

from vespo_megatron.recipe.nemo_rl_keys import WITHOUT_EFFECT
from vespo_megatron.recipe.schema import Recipe

_INTERPOLATION = {"type": "string", "pattern": r"\$\{.+\}"}
_DEFAULTS = {
    "description": "Recipes to start from, relative to this file; later ones win.",
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
}


def json_schema() -> dict[str, Any]:
    """The schema (draft 2020-12) of a recipe file."""
    schema = Recipe.model_json_schema()
    for section in [schema, *schema["$defs"].values()]:
        section.pop("required", None)
        section["properties"] = {name: _key(facts) for name, facts in section["properties"].items()}
    schema["properties"] = {"defaults": _DEFAULTS} | schema["properties"]
    for name, reason in WITHOUT_EFFECT.items():
        _section_of(schema, name)["properties"][name.rpartition(".")[2]] = {"description": f"No effect: {reason}."}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A vespo_megatron recipe", **schema}


def _key(facts: dict[str, Any]) -> dict[str, Any]:
    """What pydantic says of a key, and that an interpolation stands for any value."""
    facts.pop("x-vespo", None)
    if "$ref" in facts:  # a section
        return facts
    about = {name: facts.pop(name) for name in ("title", "description", "default") if name in facts}
    if facts.get("type") == "object":
        facts["properties"] = {"_override_": {"type": "boolean", "description": "Drop what was inherited."}}
    return about | {"anyOf": [*facts.get("anyOf", [facts]), _INTERPOLATION]}


def _section_of(schema: dict[str, Any], name: str) -> dict[str, Any]:
    """The schema of the section that a dotted key is in."""
    section = schema
    for part in name.split(".")[:-1]:
        section = schema["$defs"][section["properties"][part]["$ref"].rpartition("/")[2]]
    return section
