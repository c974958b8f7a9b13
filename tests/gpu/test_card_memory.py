"""What a trainer process takes of the card, by what it is for, against `plan`'s model: within a tenth."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import slice_model
from benchmarks.training_step import train_step
from vespo_megatron.megatron import parallel
from vespo_megatron.plan.memory import trainer_memory
from vespo_megatron.trainer.objective import Objective

GIB = 2**30


@pytest.mark.cuda
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_a_layer_of_the_30b_model_takes_what_plan_says(recompute, tmp_path, note):
    slice_model.write_config(2, "cuda", tmp_path / "model")
    batch = slice_model.make_batch(1, slice_model.PACK_TOKENS, 151936)
    recipe = slice_model.make_recipe("cuda", tmp_path / "model", len(batch.samples)).with_values(
        {"policy.megatron_cfg.activation_checkpointing": recompute, "cluster.device": "cuda"}
    )
    try:
        rank_info = slice_model.start("cuda", tmp_path)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        policy, objective = slice_model.make_policy(recipe.policy, rank_info), Objective(recipe.loss_fn, "rollout")
        train_step(batch, recipe, policy, objective)
        held = torch.cuda.memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        train_step(batch, recipe, policy, objective)
        on_top = torch.cuda.max_memory_allocated() - before - held
        planned = trainer_memory(policy.shape, recipe)
        slice_model.free(policy)
    finally:
        parallel.finalize()
    static = planned.weights + planned.gradients + planned.optimizer
    moving = planned.activations + planned.logits
    note(held=held / GIB, planned_held=static / GIB, on_top=on_top / GIB, planned_on_top=moving / GIB)
    assert held == pytest.approx(static, rel=0.1)
    assert held + on_top == pytest.approx(static + moving, rel=0.1)
