"""`plan`'s memory model against what the processes of every layout really hold."""

from __future__ import annotations

import layout_work
import memory_work
import pytest
from family_checkpoints import make_family
from random_checkpoint import make_checkpoint
from test_layout_parity import LAYOUTS, VPP

from vespo_megatron.plan import activations
from vespo_megatron.plan.memory import local_parameters, optimizer_bytes
from vespo_megatron.recipe.model_shape import read_shape
from vespo_megatron.recipe.schema import Recipe


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("sparse"))
    make_checkpoint(folder, mlp_only_layers=[], vocab_size=128)
    return folder


def recipe_of(folder, layout, world_size, precision):
    recipe = Recipe(policy=layout_work.policy_config(folder, layout)).with_values(
        {
            "policy.precision": precision,
            "cluster.device": "cpu",
            "cluster.gpus_per_node": world_size,
            "cluster.num_nodes": 1,
        }
    )
    return recipe


def assert_within_a_tenth(workers, folder, world_size, layout, precision):
    count = 2 if VPP in layout else 1  # megatron-core interleaves no fewer than there are stages
    answers = workers.run(
        memory_work.held, world_size, folder=folder, layout=layout, precision=precision, micro_batches=count
    )
    recipe, shape = recipe_of(folder, layout, world_size, precision), read_shape(folder)
    element = activations.element_size(recipe)
    for stage in {answer["stage"] for answer in answers}:
        mine = [answer for answer in answers if answer["stage"] == stage]
        local = local_parameters(shape, recipe, stage)
        kept = activations.kept(shape, recipe, mine[0]["tokens"], stage, padding=1.0)
        expected = {
            "weights": local.total * element,
            "gradients": local.total * 4,
            "optimizer": optimizer_bytes(recipe, local),
            "activations": kept * activations.in_flight(recipe.policy.megatron_cfg, stage, count),
        }
        # Over the ranks of a stage, since one expert parallel rank gets more tokens than another.
        found = {part: sum(answer[part] for answer in mine) / len(mine) for part in expected}
        assert found == pytest.approx(expected, rel=0.1), (stage, {k: found[k] / expected[k] for k in found})


@pytest.mark.parametrize(
    ("name", "precision"),
    [*((name, precision) for name in LAYOUTS for precision in ("float32", "bfloat16")), ("tp2_ep2", "float16")],
)
def test_the_model_is_within_a_tenth_of_what_is_held(name, precision, workers, sparse):
    world_size, layout = LAYOUTS[name]
    assert_within_a_tenth(workers, sparse, world_size, layout, precision)


@pytest.mark.parametrize("name", ["recompute", "tp2_sp", "dp2"])
@pytest.mark.parametrize("model_type", ["llama", "olmoe", "glm4_moe"])
def test_the_model_knows_every_kind_of_layer(model_type, name, workers, tmp_path):
    """Dense layers, no norm of queries and keys or one over the width, a shared expert, a bias in attention."""
    make_family(tmp_path, model_type, vocab_size=128)
    assert_within_a_tenth(workers, str(tmp_path), *LAYOUTS[name], "float32")
