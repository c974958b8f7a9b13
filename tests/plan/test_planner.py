"""`plan`: every 30B recipe gets an answer, and what it says follows from the published shapes."""

from __future__ import annotations

from pathlib import Path

import pytest

from vespo_megatron.cli import main
from vespo_megatron.errors import UserError
from vespo_megatron.megatron.hardware import GPUS, gpu
from vespo_megatron.plan import activations
from vespo_megatron.plan.memory import local_parameters, parameters, trainer_memory, weight_copies
from vespo_megatron.plan.planner import plan, report
from vespo_megatron.plan.published import PUBLISHED, shape_of
from vespo_megatron.plan.timing import default_lengths, kv_bytes_per_token
from vespo_megatron.recipe.loader import load_recipe

EXAMPLES = Path(__file__).parents[2] / "examples" / "qwen3_30b_a3b"
FOLDERS = ("grid", "async", "mismatch", "ablations")
RUNS = sorted(path for name in FOLDERS for path in (EXAMPLES / name).glob("*.yaml") if path.stem != "async")
SHAPE = PUBLISHED["Qwen3-30B-A3B"]


def test_the_shape_has_the_published_number_of_parameters():
    """30.5B in all, 29.9B without embeddings: the model card of Qwen3-30B-A3B on the Hugging Face hub."""
    count = parameters(SHAPE)
    assert round(count.total / 1e9, 1) == 30.5
    assert round((count.total - 2 * SHAPE.vocab_size * SHAPE.hidden_size) / 1e9, 1) == 29.9


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_recipe_of_the_30b_model_plans(path):
    recipe = load_recipe(path)
    found = plan(SHAPE, recipe, gpu("h100-80"), default_lengths(recipe))
    assert found.memory.device > 0 and 0 < found.train < found.step < 1e6
    text = report(SHAPE, found, default_lengths(recipe))
    assert ("does not fit" in text) == (not found.fits)


def test_the_paper_s_layout_fits_80_gb_and_without_offload_or_sharding_does_not():
    recipe = load_recipe(EXAMPLES / "grid" / "vespo_n8.yaml")
    device = gpu("h100-80")
    assert plan(SHAPE, recipe, device, default_lengths(recipe)).fits
    recipe = recipe.with_values(
        {
            "policy.megatron_cfg.optimizer.optimizer_cpu_offload": False,
            "policy.megatron_cfg.optimizer.use_distributed_optimizer": False,
        }
    )
    found = plan(SHAPE, recipe, device, default_lengths(recipe))
    assert not found.fits
    text = report(SHAPE, found, default_lengths(recipe))
    assert "does not fit" in text and "nearest layout that does: " in text


def test_processes_of_every_stage_and_rank_hold_the_model_between_them():
    recipe = load_recipe(EXAMPLES / "grid" / "vespo_n8.yaml")
    recipe = recipe.with_values({"policy.megatron_cfg.pipeline_model_parallel_size": 4})
    megatron = recipe.policy.megatron_cfg
    dense = expert = 0
    for stage in range(4):
        local = local_parameters(SHAPE, recipe, stage)
        dense += local.dense * megatron.tensor_model_parallel_size
        expert += local.expert * megatron.expert_model_parallel_size
    assert expert == parameters(SHAPE).expert
    # Norms and routers are held by every tensor parallel rank.
    shared = SHAPE.num_hidden_layers * (2 * SHAPE.hidden_size + 2 * SHAPE.head_dim)
    shared += SHAPE.num_hidden_layers * SHAPE.hidden_size * SHAPE.num_experts + SHAPE.hidden_size
    assert dense == parameters(SHAPE).dense + shared


def test_keys_and_values_of_a_token_are_96_kib():
    """2 × 48 layers × 4 heads × 128 × 2 bytes."""
    assert kv_bytes_per_token(SHAPE) == 96 * 1024


def test_recompute_trades_activations_for_time():
    recipe = load_recipe(EXAMPLES / "grid" / "vespo_n8.yaml")
    device, lengths = gpu("h100-80"), default_lengths(recipe)
    full = plan(SHAPE, recipe, device, lengths)
    recipe = recipe.with_values({"policy.megatron_cfg.activation_checkpointing": False})
    none = plan(SHAPE, recipe, device, lengths)
    assert none.memory.activations > 8 * full.memory.activations
    # Forward, backward (two) and the pass for π_old; recompute is another forward.
    assert none.train == pytest.approx(full.train * 4 / 5)


@pytest.mark.parametrize("stages, virtual, held", [(1, None, [1]), (4, None, [4, 3, 2, 1]), (2, 2, [2.5, 1.5])])
def test_micro_batches_in_flight(stages, virtual, held):
    recipe = load_recipe(EXAMPLES / "grid" / "vespo_n8.yaml")
    recipe = recipe.with_values(
        {
            "policy.megatron_cfg.pipeline_model_parallel_size": stages,
            "policy.megatron_cfg.virtual_pipeline_model_parallel_size": virtual,
        }
    )
    megatron = recipe.policy.megatron_cfg
    assert [activations.in_flight(megatron, stage) for stage in range(stages)] == held
    assert activations.in_flight(megatron, 0, micro_batches=1) == 1
    assert trainer_memory(SHAPE, recipe).activations > 0


def test_the_command_says_3_where_it_does_not_fit(capsys):
    recipe = str(EXAMPLES / "grid" / "vespo_n8.yaml")
    assert main(["plan", recipe, "--gpu", "h100-80"]) == 0
    assert "TP2 EP8 DP16 recompute offload" in capsys.readouterr().out
    too_much = ["policy.megatron_cfg.activation_checkpointing=false", "policy.sequence_packing.train_mb_tokens=262144"]
    assert main(["plan", recipe, *too_much, "--gpu", "h100-80", "--compare", "3"]) == 3
    said = capsys.readouterr().out
    assert "does not fit" in said and said.count("recompute") > 3
    assert main(["plan", recipe, "--gpu", "v100"]) == 2
    said = capsys.readouterr().err
    assert all(name in said for name in GPUS)


def test_a_model_that_is_neither_a_folder_nor_published_is_named():
    with pytest.raises(UserError, match="policy.model_name"):
        shape_of("/models/Mixtral-8x7B")
    assert shape_of("/models/Qwen3-30B-A3B-Base") is SHAPE


def test_copies_of_the_weights_are_planned_on_the_host_and_their_passes_in_time():
    recipe = load_recipe(EXAMPLES / "async" / "vespo.yaml")
    device, lengths = gpu("h100-80"), default_lengths(recipe)
    known = {"grpo.async_grpo.staleness_threshold": 1.5, "loss_fn.behavior": "version"}
    rollout, version = plan(SHAPE, recipe, device, lengths), plan(SHAPE, recipe.with_values(known), device, lengths)
    assert rollout.memory.weight_copies == 0 and "copies" not in report(SHAPE, rollout, lengths)
    # Three versions, since a token may be ⌈1.5⌉ behind, and its own while another is in use between two updates.
    assert version.memory.weight_copies == 4 * version.memory.weights
    per_node = 8 * version.memory.weight_copies / 2**30
    assert f"4 copies of the weights, {per_node:.0f} GiB a node" in report(SHAPE, version, lengths)
    assert version.memory.device == rollout.memory.device
    # Forward, backward (two), recompute; a pass for each version besides.
    assert version.train == pytest.approx(rollout.train * 7 / 4)
    one = recipe.with_values(known | {"grpo.async_grpo.sync_every": 1})
    assert weight_copies(one) == 3, "the newest version is a copy of its own"
    synchronous = recipe.with_values({"loss_fn.behavior": "version", "grpo.async_grpo.enabled": False})
    assert weight_copies(synchronous) == 0
    reference = {"loss_fn.reference_policy_kl_penalty": 0.1}
    assert weight_copies(synchronous.with_values(reference)) == 2
    assert weight_copies(one.with_values(reference)) == 5
    flow = {"policy.quantization.scheme": "fp8_e4m3"}
    assert weight_copies(one.with_values(reference | flow)) == 6
    assert weight_copies(synchronous.with_values(flow | {"policy.quantization.where": "rollout"})) == 0


COLOCATED = {
    "policy.generation.sglang_cfg.colocated": True,
    "policy.generation.sglang_cfg.weight_transport": "tensor",
    "policy.generation.sglang_cfg.mem_fraction_static": 0.85,
}


def test_a_colocated_recipe_has_a_peak_for_each_phase():
    device = gpu("h100-80")
    apart = load_recipe(EXAMPLES / "grid" / "vespo_n8.yaml")
    lengths = default_lengths(apart)
    assert plan(SHAPE, apart, device, lengths).phases == []
    recipe = apart.with_values(COLOCATED)
    found = plan(SHAPE, recipe, device, lengths)
    build, weights, servers, train = found.phases
    memory, served = found.memory, parameters(SHAPE).total * 2
    assert [phase.name for phase in found.phases] == ["build", "weights", "servers", "train"]
    assert train.trainer == memory.device and train.server == build.server == servers.trainer == 0
    assert memory.weights + memory.gradients <= build.trainer < memory.device
    assert weights.server == served // recipe.policy.generation.sglang_cfg.tensor_parallel_size
    assert weights.trainer == memory.weights + 2 * recipe.policy.generation.sglang_cfg.weight_bucket_bytes
    assert servers.server == int(0.85 * 80 * 2**30) + 3 * 2**30
    text = report(SHAPE, found, lengths)
    per_node = recipe.cluster.gpus_per_node * (memory.weights + memory.optimizer) / 2**30
    assert f"{per_node:.0f} a node" in text and "with mem_fraction_static 0.85 it fits; at most 0.92" in text


def test_a_share_that_leaves_idle_trainers_no_room_does_not_fit():
    recipe = load_recipe(EXAMPLES / "grid" / "vespo_n8.yaml").with_values(
        COLOCATED | {"policy.generation.sglang_cfg.mem_fraction_static": 0.95}
    )
    device, lengths = gpu("h100-80"), default_lengths(recipe)
    found = plan(SHAPE, recipe, device, lengths)
    assert not found.fits and not found.phases[2].fits(device)
    text = report(SHAPE, found, lengths)
    assert "with mem_fraction_static 0.95 it does not fit" in text and "lower policy.generation.sglang_cfg" in text
