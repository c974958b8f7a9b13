"""What a family says of itself, and where families are found."""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import vespo_megatron.families
from vespo_megatron.families.config_keys import ConfigKeys
from vespo_megatron.families.shape import ModelShape, TensorNames

ENTRY_POINTS = "vespo_megatron.families"
"""The group in which a package registers `model_type = module:FAMILY`."""


def _anything(_shape: ModelShape) -> str:
    return ""


@dataclass(frozen=True)
class Family:
    """One `model_type`."""

    read: Callable[[ConfigKeys], ModelShape]
    """The shape its `config.json` describes; raises `UserError` for what is missing, wrong or not trained here."""
    names: TensorNames = TensorNames()
    not_served: Callable[[ModelShape], str] = _anything
    """Why SGLang 0.5.23 cannot serve a model of this shape, or would serve another one; empty where it can."""
    as_moe: Callable[[Mapping[str, Any], int, int], dict[str, Any]] | None = None
    """(`config.json`, experts, experts per token) of a dense model → the same of an MoE whose experts are copies of its
    MLPs and whose gates add up to one; None where no family of MoEs has the rest of such a model."""
    ties_head_when_served: bool = False
    """Whether SGLang 0.5.23 finds the output layer of a checkpoint that ties it to the embedding. Where it does not, a
    server is of use once it has been sent weights."""


def family_of(model_type: str) -> Family | None:
    """The family of that name; None where there is none."""
    if model_type in _own():
        module = importlib.import_module(f"{vespo_megatron.families.__name__}.{model_type}")
        return _checked(getattr(module, "FAMILY", None), module.__name__)
    # Last: it reads the metadata of every package that is installed.
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS, name=model_type):
        return _checked(entry.load(), entry.value)
    return None


def known_families() -> list[str]:
    """Every `model_type` that can be trained."""
    own = [name for name in _own() if family_of(name) is not None]
    return sorted({*own, *importlib.metadata.entry_points(group=ENTRY_POINTS).names})


def _own() -> list[str]:
    """Modules of this package, but for the ones that are about all families."""
    shared = {"config_keys", "decoder", "family", "shape"}
    return [
        module.name for module in pkgutil.iter_modules(vespo_megatron.families.__path__) if module.name not in shared
    ]


def _checked(found: object, where: str) -> Family:
    if not isinstance(found, Family):
        raise TypeError(f"{where} is {found!r}, not a Family")
    return found
