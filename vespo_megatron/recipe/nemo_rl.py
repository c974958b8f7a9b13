"""NeMo-RL recipes (https://github.com/NVIDIA-NeMo/RL, `examples/configs`): what each of their keys is here.

Every key of such a file gets one `Finding`: it carries over as it is, under another name, or with a difference that is
said; it has no meaning here, would change training and is not to be had here, or is not known at all. What carries over
makes a recipe of ours. Keys of `grpo` and `loss_fn` that a file leaves out have NeMo-RL's defaults, not ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vespo_megatron.errors import UserError
from vespo_megatron.recipe import nemo_rl_advantages, nemo_rl_loss
from vespo_megatron.recipe.dotted import leaves, nested
from vespo_megatron.recipe.loader import flatten, plain, read_layers, recipe_of
from vespo_megatron.recipe.nemo_rl_keys import MEANINGLESS, NEUTRAL, RENAMES, WITHOUT_EFFECT
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.recipe.schema.describe import keys_of, members

SAME, RENAMED, DIFFERS = "same", "renamed", "with a difference"
IGNORED, REFUSED, UNKNOWN = "no meaning here", "not supported", "unknown"


_NULLABLE = {key for key, field in keys_of(Recipe) if type(None) in members(field.annotation)}
"""Keys that may be null here, which then says the same as there."""


@dataclass(frozen=True)
class Finding:
    """What one key of theirs is here."""

    key: str
    value: Any
    kind: str
    """`SAME`, `RENAMED`, `DIFFERS`, `IGNORED`, `REFUSED` or `UNKNOWN`."""
    note: str = ""
    """Our keys and values, or the reason."""


def translate(path: str | Path) -> tuple[Recipe, list[Finding]]:
    """The recipe that carries over, and a `Finding` for every key of the file and its defaults.

    Raises:
        UserError: a file that cannot be read or whose interpolations do not resolve.
    """
    theirs = dict(leaves(_resolved(Path(path))))
    unsaid = {key: value for key, value in nemo_rl_advantages.DEFAULTS.items() if key not in theirs}
    everything = unsaid | theirs
    refused, different = nemo_rl_advantages.refusals(everything), nemo_rl_advantages.differences(everything)
    ours: dict[str, Any] = {}
    findings = []
    known = flatten(Recipe())
    for key, value in everything.items():
        finding = _finding(key, value, known, ours)
        if key in refused:
            finding = replace(finding, kind=REFUSED, note=refused[key])
        elif key in different:
            finding = replace(finding, kind=DIFFERS, note=different[key])
        if key in unsaid:
            finding = replace(finding, note="; ".join(filter(None, ["not in the file: their default", finding.note])))
        findings.append(finding)
    ours |= nemo_rl_loss.objective(theirs) | nemo_rl_advantages.advantages(theirs)
    return recipe_of(nested(ours), str(path)), findings


def _finding(key: str, value: Any, known: dict[str, Any], ours: dict[str, Any]) -> Finding:
    if key in RENAMES:
        name, convert = RENAMES[key]
        if value is not None:
            ours[name] = convert(value)
        return Finding(key, value, RENAMED, name if value is not None else f"{name}: its default")
    if key in nemo_rl_loss.KEYS:
        return Finding(key, value, RENAMED, "of loss_fn's name, hyperparameters, aggregation, behavior and correction")
    if key in nemo_rl_advantages.KEYS:
        return Finding(key, value, RENAMED, "of grpo.advantage_estimator and its two switches")
    if key in WITHOUT_EFFECT:
        return Finding(key, value, IGNORED, WITHOUT_EFFECT[key])
    if key in NEUTRAL:
        values, reason = NEUTRAL[key]
        return Finding(key, value, IGNORED if value in values else REFUSED, reason)
    if key in known or any(name.startswith(f"{key}.") for name in known):
        if value is None and known.get(key) is not None and key not in _NULLABLE:
            return Finding(key, value, SAME, f"null: our default, {known[key]!r}")
        if value is not None or key in _NULLABLE:
            ours[key] = value
        return Finding(key, value, SAME)
    for pattern, reason in MEANINGLESS:
        if fnmatchcase(key, pattern):
            return Finding(key, value, IGNORED, reason)
    return Finding(key, value, UNKNOWN, "this version does not know the key")


def _resolved(path: Path) -> dict[str, Any]:
    for name, function in _RESOLVERS.items():
        try:
            OmegaConf.register_resolver(name, function, replace=True)
        except TypeError:  # omegaconf 2.3, where this name is of an older function
            OmegaConf.register_new_resolver(name, function, replace=True)
    merged = OmegaConf.merge(*(layer.content for layer in read_layers(path)))
    try:
        return plain(merged, resolve=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        raise UserError(str(error).splitlines()[0], where=f"{path}, {key}" if key else str(path)) from None


def _divide(left: float, right: float) -> float:
    return left // right if left % right == 0 else left / right


_RESOLVERS: dict[str, Callable[..., Any]] = {
    "mul": lambda *values: prod(values),
    "max": lambda *values: max(values),
    "min": lambda *values: min(values),
    "div": _divide,
}
"""NeMo-RL's own, as in `${mul:2,3}`."""
