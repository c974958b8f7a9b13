"""`vespo-megatron eval RECIPE`: score a checkpoint or a served model on problem sets, without training."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vespo_megatron.controller.evaluation import draw_set
from vespo_megatron.controller.sampler import Sampler
from vespo_megatron.data.prompt_set import PromptRecord
from vespo_megatron.data.template import load_tokenizer
from vespo_megatron.environments import EnvironmentPool
from vespo_megatron.errors import UserError
from vespo_megatron.evaluation.record import table, write_problems
from vespo_megatron.evaluation.scores import Problem, by_set, summary
from vespo_megatron.launch import preflight
from vespo_megatron.launch.model_source import model_folder
from vespo_megatron.launch.prompts import load_usable
from vespo_megatron.launch.worker import build_engine
from vespo_megatron.recipe.loader import save_recipe
from vespo_megatron.recipe.rules import validate
from vespo_megatron.recipe.schema import DatasetConfig, MismatchConfig, QuantizationConfig, Recipe
from vespo_megatron.rewards import RewardPool
from vespo_megatron.rollout_sglang import launch_servers
from vespo_megatron.rollout_sglang.engine import RolloutEngine
from vespo_megatron.run.processes import stop_on_signals
from vespo_megatron.run.run_directory import RECIPE_FILE, make_run_directory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBLEMS, TABLE, SCORES = "problems.jsonl", "table.md", "scores.json"


def evaluate(
    recipe: Recipe, *, checkpoint: str | None = None, data: Sequence[str] = (), repeats: Mapping[str, int] | None = None
) -> tuple[Path, str]:
    """Answer every problem and write `problems.jsonl`, `table.md`, `scores.json`; returns their folder and the table.

    The checkpoint answers as it is: what `policy.generation.mismatch` and `policy.quantization` say is of training.

    Args:
        recipe: model, engine, sampling (`val_temperature`, `val_top_p`), reward and validation set.
        checkpoint: a Hugging Face folder, a run, or a checkpoint of one; default the recipe's model. Where the recipe
            names servers by URL they are asked as they are, and this must not be given.
        data: files in veRL's schema instead of the recipe's validation set.
        repeats: responses per problem, by data source; "" for every other, default `grpo.val_num_generations`.

    Raises:
        UserError: whatever is wrong with one of them; Stopped: a signal. No process is left.
    """
    urls = recipe.policy.generation.backend == "sglang" and recipe.policy.generation.sglang_cfg.urls
    if checkpoint and urls:
        raise UserError(
            "and policy.generation.sglang_cfg.urls are two models",
            where="--checkpoint",
            fix="leave one out: servers named by URL answer with what they serve",
        )
    recipe = recipe.with_values(
        {
            "exp_manager.name": f"{recipe.exp_manager.name}_eval",
            "exp_manager.resume_if_exists": False,
            "policy.generation.mismatch": MismatchConfig(),
            "policy.quantization": QuantizationConfig(),
        }
    )
    with stop_on_signals(), ExitStack() as stack:
        folder = make_run_directory(recipe.exp_manager)
        if checkpoint:
            recipe = recipe.with_values({"policy.model_name": str(model_folder(checkpoint, folder / "model"))})
        validate(recipe)
        preflight.check_model(recipe.policy.model_name)
        records, tokenizer = _problems(recipe, data)
        save_recipe(recipe, folder / RECIPE_FILE)
        rewards = RewardPool(recipe.env, recipe.data.reward_choices)
        stack.callback(rewards.close)
        environments = EnvironmentPool(recipe.env) if recipe.env.environment else None
        if environments is not None:
            stack.callback(environments.close)
        engine = _engine(recipe, folder, stack)
        sampler = Sampler(recipe, tokenizer, rewards, engine.generate, environments)
        problems = asyncio.run(_draw(sampler, records, repeats or {}, recipe))
    return folder, _write(problems, folder)


def parse_repeats(texts: Sequence[str]) -> dict[str, int]:
    """["4", "aime24=32"] → {"": 4, "aime24": 32}. Raises UserError."""
    repeats = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        if not re.fullmatch("0*[1-9][0-9]{0,8}", number):
            raise UserError(f"is {text!r}", where="--samples", expected="N or SET=N, as in 4 or aime24=32")
        repeats[name] = int(number)
    return repeats


def _problems(recipe: Recipe, data: Sequence[str]) -> tuple[list[PromptRecord], PreTrainedTokenizerBase]:
    tokenizer = load_tokenizer(recipe)
    sets = [DatasetConfig(path=path) for path in data] or [recipe.data.validation]
    if not sets[0].given:
        raise UserError("has no value", where="data.validation.path", fix="name problem sets: --data FILE …")
    records: list[PromptRecord] = []
    for number, dataset in enumerate(sets):
        loaded, notes = load_usable(dataset, recipe, tokenizer)
        for note in notes:
            print(note, file=sys.stderr)
        # Two files may have the same name.
        chosen = loaded[: recipe.grpo.max_val_samples if not data else None]
        records += [replace(record, prompt_id=f"{number}/{record.prompt_id}") for record in chosen]
    return records, tokenizer


def _engine(recipe: Recipe, folder: Path, stack: ExitStack) -> RolloutEngine:
    theirs = bool(recipe.policy.generation.sglang_cfg.urls)
    if recipe.policy.generation.backend == "sglang":
        urls = stack.enter_context(launch_servers(recipe, folder)).urls
        recipe = recipe.with_values({"policy.generation.sglang_cfg.urls": urls})
    engine = build_engine(recipe, takes_over=not theirs)
    stack.callback(engine.close)
    return engine


async def _draw(
    sampler: Sampler, records: Sequence[PromptRecord], repeats: Mapping[str, int], recipe: Recipe
) -> list[Problem]:
    """All sets at a time; `repeats` is theirs, before what the recipe says of a set."""
    sets: dict[str, list[PromptRecord]] = {}
    for record in records:
        sets.setdefault(record.set_name or record.data_source, []).append(record)
    if unknown := set(repeats) - {"", *sets}:
        raise UserError(f"{min(unknown)!r} is no set here", where="--samples", expected=f"one of {sorted(sets)}")
    answers = await asyncio.gather(
        *(
            draw_set(sampler, members, recipe, "eval", repeats=repeats.get(name, repeats.get("")))
            for name, members in sets.items()
        )
    )
    return [problem for problems, _ in answers for problem in problems]


def _write(problems: Sequence[Problem], folder: Path) -> str:
    if not problems:
        raise UserError("no response was usable", where=str(folder))
    write_problems(problems, folder / PROBLEMS)
    text = table(problems)
    (folder / TABLE).write_text(text + "\n", encoding="utf-8")
    scores = {
        name: {measure: asdict(score) for measure, score in summary(members).items()}
        for name, members in by_set(problems).items()
    }
    (folder / SCORES).write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    return text
