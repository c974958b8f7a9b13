"""A skipped update, kept so that it can be run again: `<run_dir>/bundles/step-<n>-update-<i>/`.

`recipe.yaml`, `bundle.json` (step, update, whose numbers were not finite, samples with their rewards), `arrays.npz`
(tokens, μ, routes, advantages; no pickles) and `weights/`, a Hugging Face folder with the weights that the update would
have changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vespo_megatron.data.batch import Batch
from vespo_megatron.data.sample import NAMES_ON_DISK, Sample
from vespo_megatron.data.sampling_mask import SamplingMask
from vespo_megatron.errors import UserError
from vespo_megatron.recipe.loader import load_recipe, save_recipe
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.run.run_directory import RECIPE_FILE

WEIGHTS = "weights"
_FACTS, _ARRAYS = "bundle.json", "arrays.npz"
_ARRAYS_OF_A_SAMPLE = (
    *("prompt_ids", "response_ids", "behavior_log_probs", "weight_versions", "loss_mask", "routes", "route_versions"),
    *("turns", "turn_rewards", "turn_advantages"),
)
_MASK = NAMES_ON_DISK["sampling_mask"]
_PLAIN = ("sample_id", "prompt_id", "finish_reason", "reward", "reward_parts")


@dataclass
class Bundle:
    """One mini-batch as it was about to be trained on."""

    recipe: Recipe
    step: int
    update: int
    not_finite: str
    """Which ranks' loss or gradients."""
    batch: Batch


def bundle_folder(run_dir: Path, step: int, update: int) -> Path:
    """Where the bundle of an update is kept."""
    return run_dir / "bundles" / f"step-{step}-update-{update}"


def write(folder: Path, bundle: Bundle) -> None:
    """Write everything but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    save_recipe(bundle.recipe, folder / RECIPE_FILE)
    arrays: dict[str, np.ndarray] = {"advantages": bundle.batch.advantages}
    samples = []
    for index, sample in enumerate(bundle.batch.samples):
        values = {_on_disk(name): getattr(sample, name) for name in _ARRAYS_OF_A_SAMPLE}
        if sample.sampling_mask is not None:
            values |= {f"{_MASK}.{name}": array for name, array in vars(sample.sampling_mask).items()}
        arrays |= {f"{index}.{name}": array for name, array in values.items() if array is not None}
        samples.append({name: getattr(sample, name) for name in _PLAIN})
    np.savez_compressed(folder / _ARRAYS, allow_pickle=False, **arrays)
    facts: dict[str, Any] = {
        "step": bundle.step,
        "update": bundle.update,
        "not_finite": bundle.not_finite,
        "samples": samples,
    }
    (folder / _FACTS).write_text(json.dumps(facts, indent=1) + "\n")


def read(folder: Path) -> Bundle:
    """Raises `UserError` when the folder is no bundle, or a damaged one."""
    try:
        facts = json.loads((folder / _FACTS).read_text())
        with np.load(folder / _ARRAYS, allow_pickle=False) as arrays:
            samples = [
                Sample(
                    **{
                        name: arrays.get(f"{index}.{_on_disk(name)}", plain.get(_on_disk(name)))
                        for name in _ARRAYS_OF_A_SAMPLE
                    },
                    **{name: value for name, value in plain.items() if name in _PLAIN},
                    sampling_mask=_sampling_mask(arrays, index),
                )
                for index, plain in enumerate(facts["samples"])
            ]
            batch = Batch(samples, arrays["advantages"])
        return Bundle(load_recipe(folder / RECIPE_FILE), facts["step"], facts["update"], facts["not_finite"], batch)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"is no bundle that can be read ({type(error).__name__}: {error})",
            where=str(folder),
            expected=f"a folder under <run>/bundles with {_FACTS}, {_ARRAYS} and {RECIPE_FILE}",
        ) from None


def _on_disk(name: str) -> str:
    return NAMES_ON_DISK.get(name, name)


def _sampling_mask(arrays: Mapping[str, np.ndarray], index: int) -> SamplingMask | None:
    if f"{index}.{_MASK}.counts" not in arrays:
        return None
    return SamplingMask(*(arrays[f"{index}.{_MASK}.{name}"] for name in ("counts", "ids")))
