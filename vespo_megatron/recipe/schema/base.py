"""`key`, a recipe key with type, bounds, meaning and source beside each other, and `Section`, a frozen group of them.

pydantic (https://docs.pydantic.dev) holds a value to its type and bounds; from the same facts come the errors, the
documentation (`vespo-megatron recipe keys`) and the JSON Schema (`vespo-megatron recipe schema`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from vespo_megatron.recipe.schema.describe import check_scalar
from vespo_megatron.recipe.schema.problems import problems_of, unknown_key

MISSING = "???"
"""A mandatory key without a value, as OmegaConf writes it."""


def key(
    default: Any,
    meaning: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    expected: str = "",
    fix: str = "",
    ours: bool = False,
) -> Any:
    """A recipe key: its default (`MISSING` makes it mandatory), its meaning, bounds and source.

    Args:
        ge, gt, le, lt: bounds of a number, inclusive and exclusive.
        expected: what an error says is right, where the bounds alone would not tell.
        fix: what an error says to do.
        ours: it has no counterpart among NeMo-RL's keys (https://github.com/NVIDIA-NeMo/RL, `examples/configs`).
    """
    facts = {"expected": expected, "fix": fix, "ours": ours}
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    given: dict[str, Any] = {name: bound for name, bound in bounds.items() if bound is not None}
    given |= {"description": meaning, "json_schema_extra": {"x-vespo": facts}}
    if isinstance(default, (list, dict)):
        return Field(default_factory=lambda: copy.deepcopy(default), **given)
    return Field(default, **given)


def section(kind: type[Section]) -> Any:
    """A group of keys within another, with its defaults."""
    return Field(default_factory=kind)


class Section(BaseModel):
    """A group of recipe keys. Frozen: whoever needs another makes one with `with_values`."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=(), validate_default=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _only_what_converts_without_loss(cls, value: Any, info: ValidationInfo) -> Any:
        return check_scalar(cls.model_fields[info.field_name or ""].annotation, value)

    def with_values(self, values: Mapping[str, Any]) -> Self:
        """A copy in which these keys, dotted from this section on, have these values.

        Raises:
            UserError: an unknown key, or a value that its key does not take.
        """
        content = self.model_dump()
        for name, value in values.items():
            *parents, leaf = name.split(".")
            group: Any = content
            for parent in parents:
                group = group.get(parent) if isinstance(group, dict) else None
            if not isinstance(group, dict) or leaf not in group:
                raise unknown_key(type(self), name, source="")
            group[leaf] = value.model_dump() if isinstance(value, Section) else value
        try:
            return type(self).model_validate(content)
        except ValidationError as error:
            raise problems_of(type(self), error, lambda _: "") from None
