"""Recipes from YAML: `defaults:` chains, `key=value` overrides, and errors that name the key and the file.

A recipe file may start with `defaults:`, one path or a list of paths relative to that file; later ones win over
earlier ones, the file itself over all of them, and overrides over the file. Wherever a file says `${recipe_dir}` its
own folder is meant (on the command line: the current directory); any other relative path is relative to the current
directory. OmegaConf's interpolation (`${grpo.seed}`, `${oc.env:USER}`) works. In a mapping with free keys
(`loss_fn.hyperparameters`, …) the line `_override_: true` drops what was inherited instead of adding to it, as in
NeMo-RL.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.schema import Recipe

_DEFAULTS, _OVERRIDE = "defaults", "_override_"
_COMMAND_LINE = "command line"
_NOT_TAKEN = (
    OmegaConfBaseException,
    TypeError,
    ValueError,
    AssertionError,
    LookupError,
    AttributeError,
    RecursionError,
    OverflowError,
)
"""What OmegaConf raises for content it does not take: its own errors, and those tests/fuzz/fuzz_recipe.py met."""


@dataclasses.dataclass
class Layer:
    """One source of keys: a file, or one override."""

    source: str
    content: dict[str, Any]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in `path` with its defaults and `overrides` ("policy.precision=float32"), as dataclasses.

    Raises:
        UserError: no such file, not YAML, a circular `defaults:`, an unknown key (naming the nearest known one), a
            value of another type than the key's, a mandatory key without a value.
    """
    return _merged([*read_layers(Path(path)), *(_override_layer(text) for text in overrides)], str(path))


def recipe_of(content: dict[str, Any], source: str) -> Recipe:
    """The recipe of a mapping that came from elsewhere than a file; raises as `load_recipe` does."""
    return _merged([Layer(source, content)], source)


def read_layers(path: Path) -> list[Layer]:
    """A file's chain of `defaults:`, first the farthest; nothing is checked against the schema."""
    return list(_file_layers(path, ()))


def _merged(layers: Iterable[Layer], source: str) -> Recipe:
    config = OmegaConf.structured(Recipe)
    for layer in layers:
        for keys in _unknown_keys(layer.content, Recipe, ()):
            raise _unknown_key(keys, layer.source)
        for keys in _cleared(layer.content, Recipe, ()):
            OmegaConf.update(config, ".".join(keys), {}, merge=False)
        try:
            config = OmegaConf.unsafe_merge(config, _without_marks(layer.content))  # merge copies both, every time
        except _NOT_TAKEN as error:
            raise _type_error(error, layer) from None
    return _to_recipe(config, source)


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write every key as YAML that `load_recipe` reads back equal; the file appears whole or not at all."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(to_yaml(recipe))
    os.replace(partial, path)


def to_yaml(recipe: Recipe) -> str:
    """Every key with its value."""
    return yaml.dump(dataclasses.asdict(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def flatten(recipe: Recipe) -> dict[str, Any]:
    """Dotted key → value, for every key of the schema."""
    return dict(_leaves(recipe, ""))


def differences(left: Recipe, right: Recipe) -> dict[str, tuple[Any, Any]]:
    """Dotted key → (left's value, right's value), where they differ."""
    ours, theirs = flatten(left), flatten(right)
    return {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}


def documentation() -> dict[str, str]:
    """Dotted key → its meaning, for every key of the schema."""
    return dict(_documentation(Recipe, ""))


# ---- reading -----------------------------------------------------------------------------------------------------


def _file_layers(path: Path, chain: tuple[Path, ...]) -> Iterator[Layer]:
    resolved = path.resolve()
    if resolved in chain:
        names = " → ".join(step.name for step in (*chain, resolved))
        raise UserError(f"defaults: goes in a circle: {names}", where=str(path), fix="remove one of them")
    content = _read(path, wanted_by=chain[-1] if chain else None)
    parents = content.pop(_DEFAULTS, None) or []
    if isinstance(parents, str):
        parents = [parents]
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise UserError(
            f"defaults is {parents!r}", where=str(path), expected="a path, or a list of paths, relative to this file"
        )
    for parent in parents:
        yield from _file_layers(path.parent / parent, (*chain, resolved))
    yield Layer(str(path), _replace_recipe_dir(content, str(resolved.parent)))


def _read(path: Path, wanted_by: Path | None) -> dict[str, Any]:
    where = f"{wanted_by}: defaults" if wanted_by else str(path)
    try:
        config = OmegaConf.load(path)
    except FileNotFoundError:
        near = _nearest(path.name, [entry.name for entry in path.parent.glob("*.y*ml")] if path.parent.is_dir() else [])
        raise UserError(f"there is no recipe {path}" + (f"; {near} exists" if near else ""), where=where) from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder", where=where, expected="a recipe file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text", where=where, expected="a YAML file") from None
    except (yaml.YAMLError, GrammarParseError, *_NOT_TAKEN) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"is not YAML ({getattr(error, 'problem', None) or error})", where=place) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})", where=where) from None
    if not isinstance(config, DictConfig):
        raise UserError("is not a mapping", where=str(path), expected="sections such as grpo: and policy:")
    return OmegaConf.to_container(config, resolve=False) or {}


def _replace_recipe_dir(value: Any, folder: str) -> Any:
    if isinstance(value, dict):
        return {name: _replace_recipe_dir(part, folder) for name, part in value.items()}
    if isinstance(value, list):
        return [_replace_recipe_dir(part, folder) for part in value]
    return value.replace("${recipe_dir}", folder) if isinstance(value, str) else value


def _override_layer(text: str) -> Layer:
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][\w.\-]*", name):
        raise UserError(f"{text!r} is no override", where=_COMMAND_LINE, expected="key=value, as in grpo.seed=7")
    try:
        content = OmegaConf.to_container(OmegaConf.from_dotlist([f"{name}={value}"]), resolve=False)
    except (yaml.YAMLError, *_NOT_TAKEN) as error:
        raise UserError(f"the value of {name} is not YAML ({error})", where=f"{_COMMAND_LINE}: {text}") from None
    return Layer(f"{_COMMAND_LINE}: {text}", _replace_recipe_dir(content, os.getcwd()))


# ---- keys --------------------------------------------------------------------------------------------------------


def _fields(section: type) -> dict[str, dataclasses.Field]:
    return {item.name: item for item in dataclasses.fields(section)}


def _section_type(item: dataclasses.Field) -> type | None:
    """The dataclass of a field that is a section, None for a plain key."""
    factory = item.default_factory
    return factory if isinstance(factory, type) and dataclasses.is_dataclass(factory) else None


def _is_free(item: dataclasses.Field) -> bool:
    return str(item.type).startswith("dict[")


def _unknown_keys(content: Any, section: type, above: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    known = _fields(section)
    for name, value in content.items() if isinstance(content, dict) else ():
        if name not in known:
            yield (*above, str(name))
        elif (inner := _section_type(known[name])) is not None:
            yield from _unknown_keys(value, inner, (*above, name))


def _cleared(content: Any, section: type, above: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    known = _fields(section)
    for name, value in content.items() if isinstance(content, dict) else ():
        if (inner := _section_type(known[name])) is not None:
            yield from _cleared(value, inner, (*above, name))
        elif _is_free(known[name]) and isinstance(value, dict) and value.get(_OVERRIDE) is True:
            yield (*above, name)


def _without_marks(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_marks(part) for name, part in value.items() if name != _OVERRIDE}
    return value


def _unknown_key(keys: tuple[str, ...], source: str) -> UserError:
    name, known = ".".join(keys), list(documentation())
    near = _nearest(name, known)
    if near is None:  # right name, wrong section
        near = next((key for key in known if key.rsplit(".", 1)[-1] == keys[-1]), None)
    fix = f"write {near}" if near else "vespo-megatron recipe keys lists every key"
    return UserError(
        f"unknown key {name}" + (f"; the nearest known key is {near}" if near else ""), where=source, fix=fix
    )


def _nearest(name: str, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)), None)


def _documentation(section: type, above: str) -> Iterator[tuple[str, str]]:
    for name, item in _fields(section).items():
        inner = _section_type(item)
        if inner is not None:
            yield f"{above}{name}", (inner.__doc__ or "").strip()
            yield from _documentation(inner, f"{above}{name}.")
        else:
            yield f"{above}{name}", item.metadata.get("doc", "")


def _leaves(section: Any, above: str) -> Iterator[tuple[str, Any]]:
    for name, item in _fields(type(section)).items():
        value = getattr(section, name)
        if _section_type(item) is not None:
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


# ---- values ------------------------------------------------------------------------------------------------------


def _type_error(error: Exception, layer: Layer) -> UserError:
    name = getattr(error, "full_key", None) or _misplaced_section(layer.content, Recipe, "") or "the recipe"
    item = _field_of(name)
    if item is None:
        expected = ""
    elif (inner := _section_type(item)) is not None:
        expected = f"a section with {', '.join(_fields(inner))}"
    else:
        expected = str(item.type).replace(" | None", " or null")
    return UserError(f"{name}: {_first_line(error)}", where=layer.source, expected=expected)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _misplaced_section(content: Any, section: type, above: str) -> str | None:
    for name, value in content.items():
        inner = _section_type(_fields(section)[name])
        if (inner is not None or _is_free(_fields(section)[name])) and not isinstance(value, dict):
            return f"{above}{name}"
        if inner is not None and (found := _misplaced_section(value, inner, f"{above}{name}.")):
            return found
    return None


def _field_of(name: str) -> dataclasses.Field | None:
    section: type | None = Recipe
    item = None
    for part in re.sub(r"\[.*", "", name).split("."):
        if section is None or part not in _fields(section):
            return item
        item = _fields(section)[part]
        section = _section_type(item)
    return item


def _to_recipe(config: DictConfig, source: str) -> Recipe:
    try:
        missing = sorted(str(name) for name in OmegaConf.missing_keys(config))
        if not missing:
            return OmegaConf.to_object(config)
    except _NOT_TAKEN as error:
        key = getattr(error, "full_key", None)
        raise UserError((f"{key}: " if key else "") + _first_line(error), where=source) from None
    raise UserError(
        f"{', '.join(missing)} has no value", where=source, fix=f"add it to the recipe, or pass {missing[0]}=…"
    )


class _Dumper(yaml.SafeDumper):
    """Strings stay strings when OmegaConf reads them back, interpolation signs included."""


def _represent_string(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    # OmegaConf reads 1e-6 as a number where YAML 1.1 reads a string, so such strings need their quotes.
    style = "'" if re.fullmatch(r"[-+]?[\d_.]+([eE][-+]?\d+)?", value) else None
    if re.search("[\x85\u2028\u2029\ufeff]", value):  # line breaks to YAML, which only double quotes escape
        style = '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value.replace("${", "\\${"), style=style)


_Dumper.add_representer(str, _represent_string)
