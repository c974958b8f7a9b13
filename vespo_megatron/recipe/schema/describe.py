"""What a key takes, in words (type, choices, bounds), for errors and documentation; and the conversions it allows."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field is, None for a plain key."""
    from pydantic import BaseModel

    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def sections_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section that each entry of a mapping with free names is, None for anything else."""
    from pydantic import BaseModel

    arguments = get_args(field.annotation) if is_free(field) else ()
    inner = arguments[1] if len(arguments) == 2 else None
    return inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None


def is_free(field: FieldInfo) -> bool:
    """Whether it is a mapping whose keys the schema does not know."""
    return get_origin(field.annotation) is dict


def keys_of(model: type[BaseModel], above: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Dotted name and field of every section and key, in the order of the schema."""
    for name, field in model.model_fields.items():
        yield f"{above}{name}", field
        inner = section_of(field)
        if inner is not None:
            yield from keys_of(inner, f"{above}{name}.")


def facts(field: FieldInfo) -> dict[str, Any]:
    """`expected`, `fix` and `ours`, as `key` was given them."""
    extra = field.json_schema_extra
    return dict(extra.get("x-vespo", {})) if isinstance(extra, dict) else {}  # type: ignore[arg-type]  # ours, a dict


def members(annotation: Any) -> list[Any]:
    """The types of a union without `Annotated`; a type alone is its only member."""
    if get_origin(annotation) is Annotated:
        return members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for part in get_args(annotation) for member in members(part)]
    return [annotation]


def check_scalar(annotation: Any, value: Any) -> Any:
    """`value` as pydantic may convert it: a truth value is no number, a number with a fraction no whole one.

    A number where a text is wanted is that text, as in YAML `version: 7`.

    Raises:
        ValueError: it would lose what it says.
    """
    kinds = members(annotation)
    numeric = int in kinds or float in kinds
    if isinstance(value, bool) and numeric and bool not in kinds:
        raise ValueError(f"{value} is no number")
    if isinstance(value, float) and int in kinds and float not in kinds:
        raise ValueError(f"{value} is no whole number")
    if isinstance(value, (int, float)) and str in kinds and not numeric and bool not in kinds:
        return str(value)
    return value


def type_text(annotation: Any) -> str:
    """As in `int or null`, `list[int]`, `one of a, b, null`."""
    kinds = members(annotation)
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if choices:
        return "one of " + ", ".join([*map(str, choices), *(["null"] if type(None) in kinds else [])])
    return " or ".join("null" if kind is type(None) else _plain(kind) for kind in kinds)


def _plain(kind: Any) -> str:
    arguments = [_plain(member) for part in get_args(kind) for member in members(part)]
    name = getattr(get_origin(kind) or kind, "__name__", str(kind))
    return f"{name}[{', '.join(arguments)}]" if arguments else name


def bounds(field: FieldInfo) -> dict[str, float]:
    """`ge`, `gt`, `le`, `lt` of a number, those there are."""
    found: dict[str, float] = {}
    for part in [*field.metadata, *_nested_metadata(field.annotation)]:
        for name, kind in (
            ("ge", annotated_types.Ge),
            ("gt", annotated_types.Gt),
            ("le", annotated_types.Le),
            ("lt", annotated_types.Lt),
        ):
            if isinstance(part, kind):
                found[name] = getattr(part, name)
    return found


def _nested_metadata(annotation: Any) -> Iterator[Any]:
    """What `Annotated` says of the members of a union."""
    if get_origin(annotation) is Annotated:
        for part in get_args(annotation)[1:]:
            yield from getattr(part, "metadata", [part])
    elif get_origin(annotation) in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _nested_metadata(member)


def bounds_text(field: FieldInfo) -> str:
    """As in `at least 1`, `more than 0`, `in (0, 1]`; empty without bounds."""
    own = facts(field).get("expected", "")
    if own:
        return own
    found = bounds(field)
    low, high = found.get("ge", found.get("gt")), found.get("le", found.get("lt"))
    if low is not None and high is not None:
        return f"in {'[' if 'ge' in found else '('}{low:g}, {high:g}{']' if 'le' in found else ')'}"
    if low is not None:
        return f"{'at least' if 'ge' in found else 'more than'} {low:g}"
    return ""


def expected_text(field: FieldInfo) -> str:
    """Everything an error says of what would have been right."""
    inner = section_of(field)
    if inner is not None:
        return f"a section with {', '.join(inner.model_fields)}"
    return ", ".join(part for part in (type_text(field.annotation), bounds_text(field)) if part)
