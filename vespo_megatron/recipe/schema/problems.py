"""pydantic's complaints about a recipe as a `UserError` that names key and file, and says what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.schema.describe import expected_text, facts, keys_of, section_of, sections_of

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError
    from pydantic.fields import FieldInfo

Source = Callable[[str], str]
"""Dotted key → the file or override that gave it its value; '' where there is none to name."""


def problems_of(model: type[BaseModel], error: ValidationError, source: Source) -> UserError:
    """All that is wrong, as one error."""
    return all_of([_problem(model, each["loc"], each["msg"], each["input"], source) for each in error.errors()])


def all_of(found: list[UserError]) -> UserError:
    """One error of several, each once; a single one is itself."""
    unique = list({str(problem): problem for problem in found}.values())
    if len(unique) == 1:
        return unique[0]
    return UserError(f"the recipe has {len(unique)} problems\n" + "\n".join(map(str, unique)))


def _problem(
    model: type[BaseModel], location: tuple[int | str, ...], message: str, value: Any, source: Source
) -> UserError:
    name, field = _field_at(model, location)
    if field is None:
        return unknown_key(model, ".".join(map(str, location)), source=source(name))
    where = source(name)
    fault = message.removeprefix("Value error, ") if _is_explained(message) else f"is {_short(value)}"
    fix = str(facts(field).get("fix", ""))
    if where:
        return UserError(f"{name}: {fault}", where=where, expected=expected_text(field), fix=fix)
    return UserError(fault, where=name, expected=expected_text(field), fix=fix)


def _is_explained(message: str) -> bool:
    return message.startswith("Value error, ")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _field_at(model: type[BaseModel], location: tuple[int | str, ...]) -> tuple[str, FieldInfo | None]:
    """The dotted key that pydantic's location is in, and its field; None when the schema has no such key."""
    names: list[str] = []
    field: FieldInfo | None = None
    section: type[BaseModel] | None = model
    parts = iter(map(str, location))
    for part in parts:
        if section is None:
            break
        names.append(part)
        if part not in section.model_fields:
            return ".".join(names), None
        field = section.model_fields[part]
        section = section_of(field)
        if (inner := sections_of(field)) is not None and (name := next(parts, None)) is not None:
            names.append(name)
            section = inner
    return ".".join(names), field


def unknown_key(model: type[BaseModel], name: str, *, source: str) -> UserError:
    """An error that names the nearest known key, or the one of the same name in another section."""
    known = [each for each, _ in keys_of(model)]
    near = nearest(name, known)
    if near is None:  # right name, wrong section
        near = next((each for each in known if each.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]), None)
    fix = f"write {near}" if near else "vespo-megatron recipe keys lists every key"
    return UserError(
        f"unknown key {name}" + (f"; the nearest known key is {near}" if near else ""), where=source, fix=fix
    )


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like it, if any is like it at all."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)), None)
