"""Recipes from YAML: `defaults:` chains, `key=value` overrides, and errors that name the key and the file.

A recipe file may start with `defaults:`, one path or a list of paths relative to that file; later ones win over
earlier ones, the file itself over all of them, and overrides over the file. Wherever a file says `${recipe_dir}` its
own folder is meant (on the command line: the current directory); any other relative path is relative to the current
directory. OmegaConf's interpolation (`${grpo.seed}`, `${oc.env:USER}`) works. In a mapping with free keys
(`loss_fn.hyperparameters`, …) the line `_override_: true` drops what was inherited instead of adding to it, as in
NeMo-RL. OmegaConf reads, merges and resolves; what a key takes is the schema's.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.nemo_rl_keys import WITHOUT_EFFECT
from vespo_megatron.recipe.schema import MISSING, Recipe
from vespo_megatron.recipe.schema.describe import is_free, keys_of, section_of
from vespo_megatron.recipe.schema.problems import nearest, problems_of, unknown_key

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
    """The recipe in `path` with its defaults and `overrides` ("policy.precision=float32"), frozen.

    Raises:
        UserError: no such file, not YAML, a circular `defaults:`, an unknown key (naming the nearest known one),
            values of another type than the key's or out of its bounds (all of them), a mandatory key without a value.
    """
    return _merged([*read_layers(Path(path)), *(_override_layer(text) for text in overrides)], str(path))


def recipe_of(content: dict[str, Any], source: str) -> Recipe:
    """The recipe of a mapping that came from elsewhere than a file; raises as `load_recipe` does."""
    return _merged([Layer(source, content)], source)


def read_layers(path: Path) -> list[Layer]:
    """A file's chain of `defaults:`, first the farthest; nothing is checked against the schema."""
    return list(_file_layers(path, ()))


def _merged(layers: Sequence[Layer], source: str) -> Recipe:
    config: Any = OmegaConf.create(Recipe().model_dump())  # so that `${grpo.seed}` finds a key that no file says
    kept: list[Layer] = []
    for layer in layers:
        content = _without(layer.content, WITHOUT_EFFECT)
        for keys in _unknown_keys(content, Recipe, ()):
            raise unknown_key(Recipe, ".".join(keys), source=layer.source)
        for keys in _cleared(content, Recipe, ()):
            OmegaConf.update(config, ".".join(keys), {}, merge=False)
        content = _without_marks(content)
        kept.append(Layer(layer.source, content))
        _refuse_misplaced(kept[-1])
        try:
            config = OmegaConf.unsafe_merge(config, content)  # merge copies both, every time
        except _NOT_TAKEN as error:
            raise UserError(_first_line(error), where=layer.source) from None
    return _validated(config, kept, source)


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write every key as YAML that `load_recipe` reads back equal; the file appears whole or not at all."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(to_yaml(recipe))
    partial.replace(path)


def to_yaml(recipe: Recipe) -> str:
    """Every key with its value."""
    return yaml.dump(recipe.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def flatten(recipe: Recipe) -> dict[str, Any]:
    """Dotted key → value, for every key of the schema."""
    return {name: _value_at(recipe, name) for name, field in keys_of(Recipe) if section_of(field) is None}


def differences(left: Recipe, right: Recipe) -> dict[str, tuple[Any, Any]]:
    """Dotted key → (left's value, right's value), where they differ."""
    ours, theirs = flatten(left), flatten(right)
    return {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}


def plain(config: Any, *, resolve: bool) -> dict[str, Any]:
    """An OmegaConf mapping as Python's own containers."""
    return cast("dict[str, Any]", OmegaConf.to_container(config, resolve=resolve) or {})


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
        near = nearest(path.name, [entry.name for entry in path.parent.glob("*.y*ml")] if path.parent.is_dir() else [])
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
    return plain(config, resolve=False)


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
        content = plain(OmegaConf.from_dotlist([f"{name}={value}"]), resolve=False)
    except (yaml.YAMLError, *_NOT_TAKEN) as error:
        raise UserError(f"the value of {name} is not YAML ({error})", where=f"{_COMMAND_LINE}: {text}") from None
    return Layer(f"{_COMMAND_LINE}: {text}", _replace_recipe_dir(content, os.getcwd()))


# ---- keys --------------------------------------------------------------------------------------------------------


def _unknown_keys(content: Any, section: type[BaseModel], above: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    known = section.model_fields
    for name, value in content.items() if isinstance(content, dict) else ():
        if name not in known:
            yield (*above, str(name))
        elif (inner := section_of(known[name])) is not None:
            yield from _unknown_keys(value, inner, (*above, name))


def _cleared(content: Any, section: type[BaseModel], above: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    known = section.model_fields
    for name, value in content.items() if isinstance(content, dict) else ():
        if (inner := section_of(known[name])) is not None:
            yield from _cleared(value, inner, (*above, name))
        elif is_free(known[name]) and isinstance(value, dict) and value.get(_OVERRIDE) is True:
            yield (*above, name)


def _without_marks(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_marks(part) for name, part in value.items() if name != _OVERRIDE}
    return value


def _without(content: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """`content` without these dotted keys."""
    for name in names:
        *parents, leaf = name.split(".")
        if _holds(content, name):
            content = _copied_along(content, parents)
            group = content
            for parent in parents:
                group = group[parent]
            del group[leaf]
    return content


def _copied_along(content: dict[str, Any], parents: Sequence[str]) -> dict[str, Any]:
    """A copy of `content` in which the mappings on this way may be changed."""
    copied = dict(content)
    if parents:
        copied[parents[0]] = _copied_along(content[parents[0]], parents[1:])
    return copied


def _holds(content: Any, name: str) -> bool:
    for part in name.split("."):
        if not isinstance(content, dict) or part not in content:
            return False
        content = content[part]
    return True


def _value_at(recipe: Any, name: str) -> Any:
    for part in name.split("."):
        recipe = getattr(recipe, part)
    return recipe


# ---- values ------------------------------------------------------------------------------------------------------


def _refuse_misplaced(layer: Layer) -> None:
    """A plain value in place of a section must not take the section's other keys with it into the merge."""
    for name, field in keys_of(Recipe):
        if section_of(field) is not None and _holds(layer.content, name):
            value = _part(layer.content, name)
            if not isinstance(value, dict):
                raise _problems({name: value}, [layer])


def _part(content: Any, name: str) -> Any:
    for part in name.split("."):
        content = content[part]
    return content


def _problems(values: dict[str, Any], layers: Sequence[Layer]) -> UserError:
    """What the schema says to these values."""
    content: dict[str, Any] = Recipe().model_dump()
    for name, value in values.items():
        *parents, leaf = name.split(".")
        group = content
        for parent in parents:
            group = group[parent]
        group[leaf] = value
    try:
        Recipe.model_validate(content)
    except ValidationError as error:
        return problems_of(Recipe, error, lambda name: _source(name, layers))
    raise AssertionError(f"{values} are taken")


def _source(name: str, layers: Sequence[Layer]) -> str:
    """The last layer that says this key, or anything in its place."""
    for layer in reversed(layers):
        content: Any = layer.content
        for part in name.split("."):
            if not isinstance(content, dict):
                return layer.source  # a plain value where a section should be
            if part not in content:
                break
            content = content[part]
        else:
            return layer.source
    return ""


def _validated(config: DictConfig, layers: Sequence[Layer], source: str) -> Recipe:
    try:
        content = plain(config, resolve=True)
    except _NOT_TAKEN as error:
        key = getattr(error, "full_key", None)
        raise UserError((f"{key}: " if key else "") + _first_line(error), where=source) from None
    missing = sorted(
        name for name, field in keys_of(Recipe) if section_of(field) is None and _part(content, name) == MISSING
    )
    if missing:
        raise UserError(
            f"{', '.join(missing)} has no value", where=source, fix=f"add it to the recipe, or pass {missing[0]}=…"
        )
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise problems_of(Recipe, error, lambda name: _source(name, layers) or source) from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


class _Dumper(yaml.SafeDumper):
    """Strings stay strings when OmegaConf reads them back, interpolation signs included."""


def _represent_string(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    # OmegaConf reads 1e-6 as a number where YAML 1.1 reads a string, so such strings need their quotes.
    style = "'" if re.fullmatch(r"[-+]?[\d_.]+([eE][-+]?\d+)?", value) else None
    if re.search("[\x85\u2028\u2029\ufeff]", value):  # line breaks to YAML, which only double quotes escape
        style = '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value.replace("${", "\\${"), style=style)


_Dumper.add_representer(str, _represent_string)
