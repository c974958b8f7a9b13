"""What can be found wrong before a server or a trainer process starts: seconds here instead of minutes there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.rules import validate
from vespo_megatron.recipe.schema import Recipe

if TYPE_CHECKING:
    from vespo_megatron.losses import PolicyLossConfig

_INDEX = "model.safetensors.index.json"


def check(recipe: Recipe) -> None:
    """Everything that needs no process: layout, checkpoint, objective, reward, prompts; cheapest first.

    Raises:
        UserError: the first thing that is wrong.
    """
    validate(recipe)
    check_model(recipe.policy.model_name)
    check_files(recipe)
    check_ports(recipe)
    check_tables(recipe)
    check_prompts(recipe)


def warnings(recipe: Recipe) -> list[str]:
    """What a checked recipe may ask for but hardly means. Imports torch."""
    from vespo_megatron.losses.expected_mismatch import scaled_away

    found = scaled_away(recipe)
    return [] if found is None else [str(found)]


def check_model(model_folder: str) -> None:
    """A Qwen3-MoE whose weight files are whole. Raises UserError naming the file."""
    from vespo_megatron.recipe.model_shape import read_shape

    read_shape(model_folder)
    for path in weight_files(Path(model_folder)):
        check_safetensors(path)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a Hugging Face folder. Raises UserError when there are none or the index is damaged."""
    index = folder / _INDEX
    if index.exists():
        try:
            return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"is damaged ({error})", where=str(index), fix="copy it again") from None
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    raise UserError("holds no weights", where=str(folder), expected=f"model.safetensors, or {_INDEX} and its shards")


def check_safetensors(path: Path) -> None:
    """Compare a file's size with what its header says (8 bytes of length, JSON, then the tensors).

    Raises:
        UserError: missing, truncated or damaged.
    """
    try:
        size = os.path.getsize(path)
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_size)) if header_size <= size - 8 else None
    except FileNotFoundError:
        raise UserError("is named by the index but missing", where=str(path), fix="copy it again") from None
    except (OSError, ValueError) as error:
        raise UserError(f"is damaged ({error})", where=str(path), fix="copy it again") from None
    if header is None:
        raise UserError(f"is truncated: {size} bytes do not hold its header", where=str(path), fix="copy it again")
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    expected = 8 + header_size + max(ends, default=0)
    if size != expected:
        what = "is truncated" if size < expected else "is damaged"
        raise UserError(f"{what}: it has {size} bytes", where=str(path), expected=f"{expected}", fix="copy it again")


def check_files(recipe: Recipe) -> None:
    """The data files exist; their content is looked at later. Raises UserError naming key and file."""
    for name in ("train", "validation"):
        path = getattr(recipe.data, name).path
        if path and not Path(path).is_file():
            raise UserError(
                f"{path} does not exist",
                where=f"data.{name}.path",
                expected="a parquet or JSONL file",
                fix="prepare the data first; relative paths start at the current directory",
            )


def check_ports(recipe: Recipe) -> None:
    """The ports that the recipe gives to SGLang servers are free. Raises UserError naming one that is not."""
    from vespo_megatron.rollout_sglang.server.ports import choose_ports

    generation = recipe.policy.generation
    config = generation.sglang_cfg
    if generation.backend == "sglang" and config.port and not config.urls:
        choose_ports(config.host, config.port, config.num_servers)


def check_tables(recipe: Recipe) -> None:
    """Names that tables own: objective, correction, aggregation, advantage estimator, reward. Imports torch."""
    from vespo_megatron.controller.parts import advantage_options
    from vespo_megatron.losses import PolicyLossConfig
    from vespo_megatron.rewards import functions

    _check_old_policy(recipe, PolicyLossConfig.from_recipe(recipe.loss_fn, recipe.behavior))
    advantage_options(recipe)
    functions.of_recipe(recipe.env)
    functions.fence(recipe.env)


def _check_old_policy(recipe: Recipe, config: PolicyLossConfig) -> None:
    """π_old of the newest weights leaves the staleness of an asynchronous run to a weight π_old/μ, or to nobody."""
    asynchronous = recipe.grpo.async_grpo
    if config.behavior != "recompute" or not asynchronous.enabled or asynchronous.staleness == 0:
        return
    weighed = config.correction is not None and config.correction.weighs
    if weighed or config.objective.anchor == "old":
        return
    raise UserError(
        "is recompute: the trainer's weights are newer than those that drew a stale sample, and nothing corrects that",
        where="loss_fn.behavior",
        expected="version (π_old of the weights that drew each token), rollout, or grpo.async_grpo.max_staleness=0",
        fix="or give loss_fn.correction a weight, as decoupled PPO and NeMo-RL's asynchronous runs do",
    )


def check_prompts(recipe: Recipe) -> None:
    """Every prompt of every split loads, tokenises, and fits. Imports transformers and datasets."""
    from vespo_megatron.data.prompts import load_prompts, load_tokenizer

    tokenizer = load_tokenizer(recipe)
    records = load_prompts(recipe.data.train, recipe, tokenizer)
    if recipe.data.validation.path:
        load_prompts(recipe.data.validation, recipe, tokenizer)
    if len(records) < recipe.grpo.num_prompts_per_step:
        raise UserError(
            f"is {recipe.grpo.num_prompts_per_step}, but {recipe.data.train.path} has {len(records)} prompts",
            where="grpo.num_prompts_per_step",
            fix=f"lower it to {len(records)}, or bring more prompts",
        )
