"""What `recipe check` lets through starts, and computes what one process computes."""

from __future__ import annotations

import layout_sweep
import pytest
from random_checkpoint import make_checkpoint
from test_layout_parity import CP, EP, ETP, PP, SP, TOLERANCE, TP, VPP

from vespo_megatron.recipe.model_shape import read_shape

ALLGATHER = {"moe_token_dispatcher_type": "allgather"}
QUICK = {
    "a dense layer among sparse ones": [
        (2, {ETP: 2}),
        (2, {TP: 2, SP: True} | ALLGATHER),
        (4, {TP: 2, SP: True, EP: 2, ETP: 2}),
    ],
    "one expert per token, tied": [(4, {TP: 2, SP: True, ETP: 4}), (4, {PP: 2, EP: 2})],
    "by threes": [(3, {PP: 3, VPP: 2}), (3, {CP: 3, ETP: 3})],
}


@pytest.fixture(scope="module")
def families(workers, tmp_path_factory):
    """Family → (its folder, one process's answer)."""
    known = {}

    def family(name):
        if name not in known:
            folder = str(tmp_path_factory.mktemp("family"))
            make_checkpoint(folder, **layout_sweep.FAMILIES[name])
            known[name] = folder, workers.run(layout_sweep.one_update, 1, folder=folder, layout={})[0]
        return known[name]

    return family


def assert_as_one_process(workers, folder, expected, world, layout):
    answers = workers.run(layout_sweep.one_update, world, folder=folder, layout=layout)
    errors = [abs(sum(answer["loss"] for answer in answers) / expected["loss"] - 1)]
    errors += [abs(answer["grad_norm"] / expected["grad_norm"] - 1) for answer in answers]
    assert max(errors) <= TOLERANCE, (layout_sweep.name_of(world, layout), max(errors))


@pytest.mark.parametrize(("family", "world", "layout"), [(name, *each) for name in QUICK for each in QUICK[name]])
def test_a_layout_that_the_check_lets_through_is_one_process(family, world, layout, families, workers):
    folder, expected = families(family)
    assert layout_sweep.allowed(read_shape(folder), world, layout)
    assert_as_one_process(workers, folder, expected, world, layout)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("family", layout_sweep.FAMILIES)
def test_every_layout_that_the_check_lets_through_is_one_process(family, families, workers):
    folder, expected = families(family)
    allowed = list(layout_sweep.layouts(read_shape(folder)))
    print(f"{family}: {len(allowed)} layouts")
    assert len(allowed) > 20
    for world, layout in allowed:
        assert_as_one_process(workers, folder, expected, world, layout)
