"""The documentation of recipe keys, made from the schema: `vespo-megatron recipe keys`."""

from __future__ import annotations

from vespo_megatron.recipe.schema import MISSING, Recipe
from vespo_megatron.recipe.schema.describe import expected_text, facts, keys_of, section_of


def documentation() -> dict[str, str]:
    """Dotted key → what it takes, its default and its meaning, for every section and key of the schema."""
    found = {}
    for name, field in keys_of(Recipe):
        inner = section_of(field)
        if inner is not None:
            found[name] = (inner.__doc__ or "").strip()
            continue
        default = field.get_default(call_default_factory=True)
        shown = "no default" if default == MISSING else f"default {_yaml(default)}"
        source = "(ours) " if facts(field).get("ours") else ""
        meaning = f"{source}{field.description}".strip()
        found[name] = f"{meaning} [{expected_text(field)}; {shown}]"
    return found


def _yaml(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
