"""What a path given as a checkpoint means: a Hugging Face folder, a run, one of its checkpoints, megatron-core's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.loader import load_recipe
from vespo_megatron.run.checkpoint_store import POLICY, CheckpointStore
from vespo_megatron.run.run_directory import FINAL_HF, RECIPE_FILE


@dataclass(frozen=True)
class Source:
    """Where weights are, and the Hugging Face folder with configuration and tokenizer."""

    weights: Path
    model: Path
    is_megatron: bool


def find_source(source: Path, model: str | None = None) -> Source:
    """What kind of thing `source` is. A run is its newest checkpoint or, where it has kept none, its exported policy.

    Args:
        model: the Hugging Face folder, where a checkpoint's own run does not tell.

    Raises:
        UserError: it is none, or has no model folder.
    """
    run = next((folder for folder in (source, *source.parents) if (folder / RECIPE_FILE).is_file()), None)
    newest = next(iter(CheckpointStore(source / "checkpoints").checkpoints().values()), source)
    if newest == source and run == source and (source / FINAL_HF / "config.json").is_file():
        source = source / FINAL_HF
    if (source / "config.json").is_file():
        return Source(source, Path(model) if model else source, is_megatron=False)
    weights = newest / POLICY if (newest / POLICY).is_dir() else newest
    if not (weights / "metadata.json").is_file():
        raise UserError(
            "is no checkpoint",
            where=str(source),
            expected="a Hugging Face folder, a run that has kept a checkpoint or its policy, a checkpoint of one, or a "
            "distributed checkpoint",
        )
    if model is None:
        if run is None:
            raise UserError(
                "does not say which model it is of",
                where=str(source),
                fix="--model FOLDER, the Hugging Face folder with config.json and tokenizer",
            )
        model = load_recipe(run / RECIPE_FILE).policy.model_name
    return Source(weights, Path(model), is_megatron=True)


def model_folder(checkpoint: str | Path, made: Path) -> Path:
    """A Hugging Face folder with what `checkpoint` means: where that is one already, or `made`, converted to it.

    Raises `UserError` as `find_source` does.
    """
    source = find_source(Path(checkpoint))
    if not source.is_megatron:
        return source.weights
    from vespo_megatron.launch.convert import convert_apart

    convert_apart(Path(checkpoint), made)
    return made
