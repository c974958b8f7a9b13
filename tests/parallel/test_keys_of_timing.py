"""Keys that change when things happen, and where: five steps compute and send the same with them and without."""

from __future__ import annotations

import keys_work
import pytest
import torch
from test_layout_parity import EP, PP, SP, TP, VPP

LAYOUTS = {
    "dp2": (2, {}),
    "dp2_ep2": (2, {EP: 2}),
    "pp2_dp2": (4, {PP: 2}),
    "vpp2_dp2": (4, {PP: 2, VPP: 2}),
    "tp2_dp2": (4, {TP: 2, SP: True}),
}
GRADIENTS = {"distributed_data_parallel_config.overlap_grad_reduce": True}
PARAMETERS = {"distributed_data_parallel_config.overlap_param_gather": True}
OFFLOAD = {"optimizer.optimizer_cpu_offload": True, "optimizer.optimizer_offload_fraction": 1.0}
KEYS = {
    "overlap_grad_reduce": (GRADIENTS, "float32"),
    "overlap_param_gather": (GRADIENTS | PARAMETERS, "float32"),
    "overlap_param_gather alone": (PARAMETERS, "float32"),
    "recompute": ({"recompute_granularity": "full"}, "float32"),
    "selective recompute": ({"recompute_granularity": "selective"}, "float32"),
    "allgather": ({"moe_token_dispatcher_type": "allgather"}, "float32"),
    "async_save": (GRADIENTS | PARAMETERS, "float32"),
    "optimizer_cpu_offload": (OFFLOAD, "bfloat16"),
    "offload with overlaps": (OFFLOAD | GRADIENTS | PARAMETERS | {"recompute_granularity": "full"}, "bfloat16"),
}
QUICK = {("dp2", "overlap_param_gather"), ("dp2_ep2", "overlap_param_gather"), ("dp2", "offload with overlaps")}
CASES = [
    pytest.param(layout, name, marks=() if (layout, name) in QUICK else pytest.mark.nightly)
    for layout in LAYOUTS
    for name in KEYS
    if name != "allgather" or EP not in LAYOUTS[layout][1]
]


@pytest.fixture(scope="module")
def without(workers, checkpoint, tmp_path_factory):
    """(layout, precision) → every rank's answers without any of the keys, computed once."""
    known = {}

    def answers(layout, precision):
        if (layout, precision) not in known:
            world_size, sizes = LAYOUTS[layout]
            others = (OFFLOAD,) if precision == "bfloat16" else ()
            given = {"folder": checkpoint[0], "sizes": sizes, "keys": {}, "precision": precision, "others": others}
            scratch = str(tmp_path_factory.mktemp("without"))
            known[layout, precision] = workers.run(keys_work.five_steps, world_size, scratch=scratch, **given)
        return known[layout, precision]

    return answers


def differences(found, expected):
    """Names of what is not the same to the last bit."""
    assert found.keys() == expected.keys()
    for name, theirs in expected.items():
        ours = found[name]
        if isinstance(theirs, dict):
            assert ours.keys() == theirs.keys(), name
            yield from (f"{name}: {key}" for key, tensor in theirs.items() if not torch.equal(ours[key], tensor))
        elif name == "log_probs":
            yield from (name for our, their in zip(ours, theirs, strict=True) if not torch.equal(our, their))
        elif ours != theirs:
            yield f"{name}: {ours} for {theirs}"


def expected_parts(steps):
    """Part of an answer → what it has to be, from the steps of a run without any key."""
    saved, rest = steps[keys_work.SAVED - 1], steps[keys_work.SAVED :]
    start = {"steps": steps, "saved": [{"weights": saved["weights"]}], "from the start": steps[:1]}
    return start | {f"resumed {index}": rest for index in range(2)}


def assert_same(found, without_keys):
    for rank, (ours, theirs) in enumerate(zip(found, without_keys, strict=True)):
        for part, expected in expected_parts(theirs["steps"]).items():
            for number, (one, other) in enumerate(zip(ours.get(part, ()), expected, strict=part in ours)):
                assert not list(differences(one, other)), (rank, part, number)


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_five_steps_are_the_same_with_it_and_without(layout, name, without, workers, checkpoint, tmp_path):
    keys, precision = KEYS[name]
    world_size, sizes = LAYOUTS[layout]
    found = workers.run(
        keys_work.five_steps,
        world_size,
        folder=checkpoint[0],
        sizes=sizes,
        keys=keys,
        scratch=str(tmp_path),
        precision=precision,
        in_thread=name == "async_save",
        others=({},) if precision == "bfloat16" else (),
    )
    assert_same(found, without(layout, precision))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_without_any_of_them_goes_on_alike_and_with_its_state_on_the_host(precision, without):
    """From a checkpoint of before its first update, too."""
    assert_same(without("dp2", precision), without("dp2", precision))


@pytest.mark.parametrize("keys", [{}, GRADIENTS])
def test_a_rank_s_own_gradients_are_looked_at_before_they_are_added_up(keys, workers, checkpoint):
    """Or with `overlap_grad_reduce` the finiteness veto would blame every rank."""
    found = workers.run(keys_work.own_gradients, 2, folder=checkpoint[0], sizes={}, keys=keys)
    assert found[0] == [(True, True), (True, False)] * 2
    assert found[1] == [(True, True), (False, False)] * 2
