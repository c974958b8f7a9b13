"""What can be found wrong before a server or a trainer process starts: seconds here instead of minutes there."""

from __future__ import annotations

import os
import resource
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.rules import validate
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.recipe.weight_files import check_safetensors, weight_files

if TYPE_CHECKING:
    from vespo_megatron.losses import PolicyLossConfig

_OPEN_FILES, _ENOUGH_OPEN_FILES = 256, 65536
"""What a run needs at least, and what the limit is raised to where it may be."""
_LONGEST_TEMPORARY_FOLDER = 75
"""Characters that leave room for a socket's name below it: Linux takes 107, multiprocessing adds 32."""


def check(recipe: Recipe) -> list[str]:
    """Everything that needs no trainer: layout, checkpoint, objective, reward, prompts; cheapest first.

    Returns:
        A sentence on each file of which prompts will be left out.

    Raises:
        UserError: the first thing that is wrong.
    """
    validate(recipe)
    check_open_files()
    check_model(recipe.policy.model_name)
    check_files(recipe)
    check_ports(recipe)
    check_temporary_folder(recipe)
    check_tables(recipe)
    return check_prompts(recipe)


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


def check_files(recipe: Recipe) -> None:
    """What data keys name is there; its content is looked at later. Raises UserError naming key and place."""
    from vespo_megatron.data.reading import missing

    for split in ("train", "validation"):
        for name, config in getattr(recipe.data, split).given.items():
            key = f"data.{split}.sets.{name}" if name else f"data.{split}"
            if (place := missing(config)) is not None:
                raise UserError(
                    f"{place} does not exist",
                    where=f"{key}.path",
                    expected="a file, a folder, a pattern that files fit, or a set on the hub",
                )


def check_open_files() -> None:
    """Room for the connections of a run's processes, which inherit this one's limit: it is raised as far as it may be.

    Where there is none, libraries abort in threads of their own, and nobody can say why.

    Raises:
        UserError: fewer than `_OPEN_FILES` may be open.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    limit = max(soft, _ENOUGH_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH_OPEN_FILES))
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    if limit < _OPEN_FILES:
        raise UserError(
            f"{limit} files may be open at a time",
            where="this process",
            expected=f"at least {_OPEN_FILES}",
            fix="raise the limit of open files (ulimit -n)",
        )


def check_ports(recipe: Recipe) -> None:
    """The ports that the recipe gives to SGLang servers are free. Raises UserError naming one that is not."""
    from vespo_megatron.rollout_sglang.server.ports import give_up, hold_ports

    generation = recipe.policy.generation
    config = generation.sglang_cfg
    if generation.backend == "sglang" and config.port and not config.urls:
        give_up(hold_ports(config.host, config.port, config.num_servers))


def check_temporary_folder(recipe: Recipe) -> None:
    """Where rewards, environments or servers have their sockets; raises UserError where no name of one would fit."""
    from vespo_megatron.rewards import functions

    folder = tempfile.gettempdir()
    has_workers = not functions.is_inline(recipe.env, recipe.data.reward_choices)
    has_workers |= recipe.env.environment is not None and recipe.env.num_environments > 0
    has_sockets = recipe.policy.generation.backend == "sglang" or has_workers
    if has_sockets and len(os.fsencode(folder)) > _LONGEST_TEMPORARY_FOLDER:
        raise UserError(
            f"is {folder}",
            where="TMPDIR",
            expected=f"at most {_LONGEST_TEMPORARY_FOLDER} characters: the kernel takes no longer name of a socket",
            fix="set TMPDIR to a folder of a shorter name",
        )


def check_tables(recipe: Recipe) -> None:
    """Names that tables own: objective, correction, aggregation, estimator, reward, environment. Imports torch."""
    from vespo_megatron.controller.parts import advantage_options
    from vespo_megatron.environments import registry
    from vespo_megatron.losses import PolicyLossConfig
    from vespo_megatron.rewards import functions

    _check_old_policy(recipe, PolicyLossConfig.from_recipe(recipe.loss_fn, recipe.behavior))
    advantage_options(recipe)
    functions.of_recipe(recipe.env)
    choices = recipe.data.reward_choices
    for choice in choices:
        functions.chosen(choice)
    functions.fence(recipe.env, choices)
    registry.check(recipe.env)


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


def check_prompts(recipe: Recipe) -> list[str]:
    """Every prompt of every split loads, tokenises, fits and can be scored. Imports transformers and datasets."""
    from vespo_megatron.data.template import load_tokenizer
    from vespo_megatron.launch.prompts import load_run_prompts

    prompts = load_run_prompts(recipe, load_tokenizer(recipe))
    wanted, schedule = recipe.grpo.num_prompts_per_step, recipe.grpo
    begun = schedule.groups_begun(wanted)
    if prompts.count is not None and prompts.count < begun:
        more = f", which begins {begun} with grpo.oversample {schedule.oversample:g}" if begun > wanted else ""
        raise UserError(
            f"is {wanted}{more}, but data.train has {prompts.count} prompts",
            where="grpo.num_prompts_per_step",
            fix=f"lower it to {int(prompts.count / schedule.oversample)}, or bring more prompts",
        )
    return prompts.notes
