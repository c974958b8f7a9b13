"""One trainer process, as the agent starts it: `python -m vespo_megatron.launch.worker <run_dir> <work>`.

Why a rank failed is written to `<run_dir>/errors/` for the launcher to print once.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.loader import load_recipe
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.run.console import outlive_readers
from vespo_megatron.run.heartbeat import Heartbeat
from vespo_megatron.run.processes import note_failure
from vespo_megatron.run.run_directory import FINAL_HF, RECIPE_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from vespo_megatron.controller.controller import Controller
    from vespo_megatron.launch.prompts import RunPrompts
    from vespo_megatron.megatron.parallel import RankInfo
    from vespo_megatron.rollout_sglang.engine import RolloutEngine
    from vespo_megatron.trainer.loop import Trainer


def main(run_dir: Path, work: str = "train") -> int:
    """Train this rank's part of the run; 0, or 2 after an error that was explained, 1 after any other."""
    outlive_readers()
    try:
        run(load_recipe(run_dir / RECIPE_FILE), run_dir, work)
        return 0
    except Exception as error:
        code = note_failure(run_dir, int(os.environ.get("RANK", "0")), error)
        # No clean-up at interpreter exit: peers wait in collectives that this rank will not join.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(recipe: Recipe, run_dir: Path, work: str = "train") -> None:
    """Build everything, train, write what remains, and leave nothing behind."""
    # Deprecations among the parts this stands on are for its developers (the tests show them), not for who trains.
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    from vespo_megatron.megatron import parallel

    heartbeat = Heartbeat(run_dir, int(os.environ["RANK"]))
    device = parallel.pick_device(recipe.cluster.device)
    rank_info = parallel.initialize(recipe.policy.megatron_cfg, seed=recipe.grpo.seed, device=device)
    _run(recipe, run_dir, rank_info, work, heartbeat)
    parallel.finalize()  # not after a failure: peers may not be there to meet
    heartbeat.close()


def _run(recipe: Recipe, run_dir: Path, rank_info: RankInfo, work: str, heartbeat: Heartbeat) -> None:
    from vespo_megatron.data.template import load_tokenizer
    from vespo_megatron.launch.prompts import load_run_prompts
    from vespo_megatron.megatron.policy import MegatronPolicy
    from vespo_megatron.trainer.checkpoint import Checkpointer
    from vespo_megatron.trainer.guard import Guard
    from vespo_megatron.trainer.loop import Trainer
    from vespo_megatron.trainer.mismatch import measure

    tokenizer = load_tokenizer(recipe) if rank_info.rank == 0 else None
    prompts = load_run_prompts(recipe, tokenizer) if tokenizer is not None else None
    recipe = limit_steps(recipe, prompts.count if prompts else None, rank_info)
    engine = take_devices(recipe, run_dir, rank_info)
    policy = MegatronPolicy(recipe.policy, rank_info, total_updates=recipe.grpo.max_num_steps * recipe.num_mini_batches)
    checkpointer = (
        Checkpointer(recipe.checkpointing, policy, run_dir, recipe.grpo.evaluates_after)
        if recipe.checkpointing.enabled
        else None
    )
    resumed = checkpointer.find() if checkpointer and recipe.exp_manager.resume_if_exists else None
    controller = (
        build_controller(recipe, run_dir, rank_info, tokenizer, prompts, resumed.step if resumed else 0, engine)
        if tokenizer is not None and prompts is not None
        else None
    )
    try:
        if work != "train":
            measure(recipe, policy, controller, run_dir, updates=work == "mismatch-updates")
            return
        trainer = Trainer(recipe, policy, controller, Guard(recipe, policy, run_dir, heartbeat), checkpointer)
        gc.collect()
        gc.freeze()  # what is loaded: a rank that looks through it again and again keeps the others waiting
        atexit.register(gc.unfreeze)  # or Triton's library reports a page of leaks
        finished = trainer.train(resumed)
        unsaved = save_last(recipe, trainer, run_dir) if finished else []
        if controller is not None:
            facts = {"engine": controller.engine.description, "trainer": describe_trainer(recipe, rank_info)}
            if phrase := recipe.policy.generation.mismatch.phrase:
                facts["mismatch"] = phrase
            if phrase := recipe.policy.quantization.phrase:
                facts["weights"] = phrase
            controller.logger.print(controller.logger.summary(facts))
        if unsaved:
            raise UserError(
                "every step was taken, but not all was saved\n  " + "\n  ".join(unsaved),
                where=str(run_dir),
                fix="make room, then resume it (exp_manager.resume_if_exists=true): only what is missing is made again",
            )
    finally:
        if controller is not None:
            controller.logger.close()
            controller.close()


def save_last(recipe: Recipe, trainer: Trainer, run_dir: Path) -> list[str]:
    """The final policy for Hugging Face; what of a finished run's end could not be saved. A collective."""
    from vespo_megatron.megatron import hf_weights

    config, policy = recipe.checkpointing, trainer.policy
    unsaved = [trainer.checkpointer.failure] if trainer.checkpointer and trainer.checkpointer.failure else []
    if config.enabled and config.save_hf:
        trainer.link.turns.to_trainer()
        try:
            hf_weights.save(policy.exporter, run_dir / FINAL_HF, copy_from=policy.model_folder)
        except UserError as error:  # on every rank
            unsaved.append(str(error))
    return unsaved


def take_devices(recipe: Recipe, run_dir: Path, rank_info: RankInfo) -> RolloutEngine | None:
    """Where servers share the trainer's devices: have them give their memory back, before anything is built there.

    They have been up for a while, with all that is theirs. A collective; rank 0 gets the engine over them.
    """
    import torch.distributed as dist

    if not recipe.policy.generation.shares_devices:
        return None
    engine = build_engine(recipe, run_dir) if rank_info.rank == 0 else None
    if engine is not None:
        engine.release_memory()
    dist.barrier()
    return engine


def limit_steps(recipe: Recipe, num_prompts: int | None, rank_info: RankInfo) -> Recipe:
    """The recipe with `grpo.max_num_steps` at most what `max_num_epochs` passes over the prompts give; a collective.

    Rank 0 says how many prompts there are, if that is known. Dynamic sampling draws more than a step trains on, and
    passes on sooner.
    """
    import torch
    import torch.distributed as dist

    schedule = recipe.grpo
    steps = schedule.max_num_steps
    if num_prompts is not None:
        steps = min(steps, schedule.max_num_epochs * num_prompts // schedule.num_prompts_per_step)
    agreed = torch.tensor([max(1, steps)], device=rank_info.device)
    dist.broadcast(agreed, src=0)
    return recipe.with_values({"grpo.max_num_steps": int(agreed.item())})


def build_controller(
    recipe: Recipe,
    run_dir: Path,
    rank_info: RankInfo,
    tokenizer: PreTrainedTokenizerBase,
    prompts: RunPrompts,
    start_step: int = 0,
    engine: RolloutEngine | None = None,
) -> Controller:
    """Rank 0's engine (None: make it), prompts, rewards and logger, for a run that goes on after `start_step`."""
    from vespo_megatron.controller.controller import Controller
    from vespo_megatron.data.stop_tokens import describe_stop_tokens
    from vespo_megatron.environments import EnvironmentPool
    from vespo_megatron.losses.behavior import describe
    from vespo_megatron.rewards import RewardPool
    from vespo_megatron.run.records import RunLogger

    logger = RunLogger(
        run_dir,
        total_steps=recipe.grpo.max_num_steps,
        tensorboard=recipe.logger.tensorboard_enabled,
        progress=recipe.logger.progress,
        start_step=start_step,
    )
    for note in prompts.notes:
        logger.print(note)
    if start_step:
        logger.print(f"resuming after step {start_step}")
    engine = engine or build_engine(recipe)
    logger.print(f"rollouts: {engine.description}")
    logger.print(f"training: {describe_trainer(recipe, rank_info)}")
    logger.print(f"responses end at: {describe_stop_tokens(recipe, tokenizer)}")
    logger.print(f"behaviour policy: {describe(recipe.behavior)}")
    if phrase := recipe.policy.generation.mismatch.phrase:
        logger.print(f"mismatch: {phrase}")
    if phrase := recipe.policy.quantization.phrase:
        logger.print(f"weights: {phrase}")
    rewards = RewardPool(recipe.env, recipe.data.reward_choices)
    if rewards.fence is not None:
        logger.print(f"programs of responses: {rewards.fence}")
    environments = EnvironmentPool(recipe.env) if recipe.env.environment else None
    if environments is not None and environments.fence is not None:
        logger.print(f"programs of turns: {environments.fence}")
    return Controller(recipe, engine, tokenizer, prompts.train, prompts.validation, rewards, logger, environments)


def build_engine(recipe: Recipe, run_dir: Path | None = None, *, takes_over: bool = True) -> RolloutEngine:
    """The rollout engine of the recipe: SGLang's servers, which already run, or the in-process one.

    Args:
        run_dir: of the run whose devices the servers share, if they do.
        takes_over: whether the servers are this caller's from now on; see `rollout_sglang.connect`.
    """
    if recipe.policy.generation.backend == "in_process":
        from vespo_megatron.megatron.parallel import pick_device
        from vespo_megatron.megatron.policy import DTYPES
        from vespo_megatron.rollout_sglang.in_process.engine import InProcessEngine
        from vespo_megatron.rollout_sglang.in_process.mismatch import EngineMismatch

        return InProcessEngine(
            recipe.policy.model_name,
            dtype=DTYPES[recipe.policy.precision],
            device=pick_device(recipe.cluster.device),
            context_length=recipe.policy.max_total_sequence_length,
            mismatch=EngineMismatch.of(recipe.policy.generation.mismatch, recipe.grpo.seed),
        )
    from vespo_megatron.rollout_sglang import connect

    return connect(recipe, recipe.policy.generation.sglang_cfg.urls, takes_over=takes_over, run_dir=run_dir)


def describe_trainer(recipe: Recipe, rank_info: RankInfo) -> str:
    """For instance 'megatron-core 0.16.1, native layers, 2 processes on cpu: TP2 PP1 CP1 EP2 DP1'."""
    import megatron.core

    from vespo_megatron.megatron.native.spec import layers_of
    from vespo_megatron.megatron.policy import DTYPES

    layers = layers_of(recipe.policy.megatron_cfg, rank_info.device.type, DTYPES[recipe.policy.precision])
    return (
        f"megatron-core {megatron.core.__version__}, {layers} layers, {rank_info.world_size} processes on "
        f"{rank_info.device.type}: TP{rank_info.tensor_size} PP{rank_info.pipeline_size} CP{rank_info.context_size} "
        f"EP{rank_info.expert_size} DP{rank_info.data_size}"
    )


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
