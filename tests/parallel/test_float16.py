"""Training in float16 under a loss scale: float32's gradients, one scale on all ranks, nothing moved by an overflow."""

from __future__ import annotations

import math

import float16_work
import layout_work
import numpy as np
import pytest
import torch
from random_checkpoint import make_checkpoint
from test_layout_parity import CP, EP, LAYOUTS, PP, SP, TP, VPP, worst

from vespo_megatron.recipe.model_shape import read_shape

OVERLAP = {
    "distributed_data_parallel_config.overlap_grad_reduce": True,
    "distributed_data_parallel_config.overlap_param_gather": True,
}
WHOLE = {"optimizer.use_distributed_optimizer": False}
HOW = {
    "one": (1, {}),
    "one by one": (1, {"moe_grouped_gemm": False}),
    "dp2": LAYOUTS["dp2"],
    "dp2_ep2 overlapped": (2, {EP: 2} | OVERLAP),
    "dp2 whole": (2, WHOLE),
    "tp2_ep2": LAYOUTS["tp2_ep2"],
    "tp2_ep2 whole": (2, {TP: 2, EP: 2, SP: True} | WHOLE),
    "pp2_ep2": (4, {PP: 2, EP: 2}),
    "vpp": (2, {PP: 2, VPP: 2}),
    "cp2 in float16 throughout": (2, {CP: 2, "distributed_data_parallel_config.grad_reduce_in_fp32": False}),
    "recompute": (1, {"recompute_granularity": "full"}),
}
ROUNDING = 2.0**-11
"""Of a number in float16."""


@pytest.fixture(scope="module")
def in_float32(workers, checkpoint):
    return workers.run(float16_work.computed, 1, folder=checkpoint[0], layout={}, precision="float32")[0]


@pytest.mark.parametrize("name", HOW)
def test_unscaled_gradients_and_the_update_are_float32s_to_rounding(name, workers, checkpoint, in_float32):
    world_size, layout = HOW[name]
    answers = workers.run(float16_work.computed, world_size, folder=checkpoint[0], layout=layout, precision="float16")
    assert all(answer["succeeded"] for answer in answers)
    error = worst(answers[0]["gradients"], in_float32["gradients"])
    norm = answers[0]["grad_norm"] / in_float32["grad_norm"] - 1
    loss = sum(answer["loss"] for answer in answers) - in_float32["loss"]  # a sum of either sign
    names = sorted(in_float32["update"])
    moved = [torch.cat([each["update"][key].flatten() for key in names]) for each in (answers[0], in_float32)]
    change = float((moved[0] - moved[1]).norm() / moved[1].norm())
    print(f"{name}: gradients {error:.1e}, norm {norm:.1e}, loss {loss:.1e}, change {change:.1e}")
    assert error < 20 * ROUNDING and abs(norm) < 4 * ROUNDING and abs(loss) < 1e-3 and change < 0.1
    assert {answer["grad_norm"] for answer in answers} == {answers[0]["grad_norm"]}


@pytest.mark.parametrize("name", ["one", "tp2_ep2", "pp2_ep2"])
def test_the_routers_own_losses_are_scaled_with_it(name, workers, checkpoint):
    world_size, layout = HOW[name]
    run = {"folder": checkpoint[0], "layout": layout}
    found, wanted = (
        workers.run(float16_work.router_losses, world_size, precision=precision, **run)[0]
        for precision in ("float16", "float32")
    )
    routers = [key for key in wanted if key.endswith("mlp.gate.weight")]
    assert len(routers) == 3
    assert all((found[key] - wanted[key]).norm() < 0.05 * wanted[key].norm() for key in routers)


@pytest.mark.parametrize("name", ["one", "tp2_ep2"])
def test_log_probs_are_nearer_to_transformers_float32_than_in_bfloat16(name, workers, checkpoint):
    apart = {}
    for precision in ("float16", "bfloat16"):
        world_size, layout = HOW[name]
        shards = workers.run(
            layout_work.log_probs, world_size, folder=checkpoint[0], layout=layout, precision=precision
        )
        apart[precision] = np.concatenate(
            [off(checkpoint[1], *shard) for shard in filter(None, shards) for shard in shard]
        )
    median = {precision: np.median(each) for precision, each in apart.items()}
    print(name, median)
    assert np.isfinite(apart["float16"]).all()
    assert median["float16"] < 2e-3 and median["float16"] < median["bfloat16"] / 4


def off(theirs, layout, sample_ids, output):
    """|log-prob − that of transformers in float32| of a micro-batch's tokens."""
    samples = {sample.sample_id: sample for sample in layout_work.ragged_batch().samples}
    found = []
    for sample_id, log_probs in zip(sample_ids, layout.merge_response_values([output[0]]), strict=True):
        sample = samples[sample_id]
        with torch.no_grad():
            logits = theirs(torch.from_numpy(sample.token_ids)[None]).logits[0] / 0.9
        expected = logits.log_softmax(-1)[len(sample.prompt_ids) - 1 : -1]
        picked = expected.gather(-1, torch.from_numpy(sample.response_ids)[:, None])[:, 0]
        found.append(np.abs(picked.numpy() - log_probs))
    return np.concatenate(found)


@pytest.mark.parametrize("name", ["one", "dp2_ep2 overlapped", "tp2_ep2 whole", "pp2_ep2", "vpp"])
def test_an_overflow_halves_the_scale_and_moves_nothing_else(name, workers, checkpoint):
    world_size, layout = HOW[name]
    ranks = workers.run(float16_work.overflowing, world_size, folder=checkpoint[0], layout=layout)
    facts = [
        [{key: row[key] for key in ("overflowed", "scale", "next", "rate", "taken")} for row in rows] for rows in ranks
    ]
    assert all(each == facts[0] for each in facts), "every rank has the same scale and the same schedule"
    rows, count = ranks[0], sum(row["overflowed"] for row in ranks[0])
    assert 5 < count < len(rows)
    for number, row in enumerate(rows):
        first = number < count
        assert row["overflowed"] == first == (not row["succeeded"]), "the first ones and no others"
        assert row["scale"] == 2.0 ** (32 - min(number, count)) and row["next"] == row["scale"] / (2 if first else 1)
        assert row["rate"] == pytest.approx(1e-3 * max(0, number - count) / 30) and math.isnan(row["norm"]) == first
        assert row["taken"] == max(0, number + 1 - count)
    for rows in ranks:
        assert not any(row["moved"] for row in rows[: count + 1]), "and the first rate of the warm-up is 0"
        assert all(row["moved"] for row in rows[count + 1 :])


@pytest.mark.parametrize("kind", ["expert", "dense"])
@pytest.mark.parametrize("name", ["one", "dp2_ep2 overlapped", "tp2_ep2 whole"])
def test_what_overflows_in_one_kind_of_weights_halves_the_scale_of_both(kind, name, workers, checkpoint):
    """megatron-core's two scalers would part ways, and the next update's gradients be twice or half as large."""
    world_size, layout = HOW[name]
    run = {"folder": checkpoint[0], "layout": layout}
    answers = workers.run(float16_work.one_kind_overflows, world_size, kind=kind, **run)
    (wanted,) = {each["grad_norm"] for each in workers.run(float16_work.norm_in_float32, world_size, **run)}
    for answer in answers:
        assert answer["skipped"] and answer["scales"] == (2.0**16, 2.0**15)
        assert answer["norm"] == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("name", ["one", "dp2_ep2 overlapped", "tp2_ep2 whole", "vpp"])
def test_a_resumed_run_has_the_scale_and_its_counters_to_the_last_bit(name, workers, checkpoint, tmp_path):
    world_size, layout = HOW[name]
    run = {"folder": checkpoint[0], "layout": layout, "checkpoint": str(tmp_path)}
    expected = workers.run(float16_work.save_among_overflows, world_size, **run)
    found = workers.run(float16_work.go_on, world_size, **run)
    after = expected[0][1]
    assert any(after["overflowed"]) and len(set(after["scales"])) == 2, "it overflows, and doubles again"
    for ours, theirs in zip(found, expected, strict=True):
        for mine, yours in zip(ours, theirs, strict=True):
            assert {key: value for key, value in mine.items() if key != "weights"} == {
                key: value for key, value in yours.items() if key != "weights"
            }
            assert all(torch.equal(mine["weights"][key], tensor) for key, tensor in yours["weights"].items())


def test_a_checkpoint_goes_on_in_another_precision(workers, checkpoint, tmp_path):
    (answer,) = workers.run(
        float16_work.from_another_precision, 1, folder=checkpoint[0], layout={}, checkpoint=str(tmp_path)
    )
    assert answer == {"equal": True, "taken": [True, True]}


def test_an_exported_folder_is_in_float16_and_says_so(workers, checkpoint, tmp_path):
    from safetensors.torch import load_file

    workers.run(
        layout_work.save_folder, 1, folder=checkpoint[0], layout={}, target=str(tmp_path / "saved"), precision="float16"
    )
    tensors = [tensor for path in (tmp_path / "saved").glob("*.safetensors") for tensor in load_file(path).values()]
    assert tensors and {tensor.dtype for tensor in tensors} == {torch.float16}
    assert read_shape(tmp_path / "saved").dtype == "float16" != read_shape(checkpoint[0]).dtype


def test_a_weight_that_float16_cannot_hold_is_named(workers, tmp_path):
    from safetensors.torch import load_file, save_file

    make_checkpoint(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.2.mlp.experts.3.down_proj.weight"][0, 0] = 1e5
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (said,) = workers.run(float16_work.too_large, 1, folder=str(tmp_path), layout={})
    assert "model.layers.2.mlp.experts" in said and "65504" in said and "bfloat16" in said
