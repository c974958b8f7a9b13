"""GPUs of a node are handed out once: by name, the trainer's first, and refused where there are too few."""

from __future__ import annotations

import pytest

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.run.devices import NodeGPUs, allocator_variables, split, trainer_variables, visible_gpus

C = "policy.generation.sglang_cfg."


def recipe(trainers=4, servers=2, share=2, **more):
    return Recipe().with_values(
        {"cluster.gpus_per_node": trainers, C + "num_servers": servers, C + "tensor_parallel_size": share}
        | {name.replace("__", "."): value for name, value in more.items()}
    )


EIGHT = tuple(map(str, range(8)))


def test_servers_come_behind_the_trainer():
    found = split(recipe(), EIGHT, with_trainer=True)
    assert found == NodeGPUs(("0", "1", "2", "3"), (("4", "5"), ("6", "7")))
    assert str(found) == "trainer on 0, 1, 2, 3; server 0 on 4, 5; server 1 on 6, 7"


def test_a_node_of_servers_alone_gives_them_all_it_has():
    assert split(recipe(trainers=8, servers=4), EIGHT, with_trainer=False).servers[3] == ("6", "7")
    assert split(recipe(trainers=8, servers=4), EIGHT, with_trainer=False).trainer == ()


def test_colocated_servers_share_the_trainer_s():
    found = split(recipe(8, 4, **{C + "colocated": True}), EIGHT, with_trainer=True)
    assert found.trainer == EIGHT and found.servers == (("0", "1"), ("2", "3"), ("4", "5"), ("6", "7"))


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        (recipe(8, 1, 1), 9),
        (recipe(4, 3, 2), 10),
        (recipe(9, 1, 1, **{C + "colocated": True}), 9),
        (recipe(2, 9, 1, **{C + "colocated": True}), 9),
    ],
)
def test_too_few_are_refused_before_anything_starts(settings, needed):
    with pytest.raises(UserError, match=f"asks for {needed} GPUs.*there are 8"):
        split(settings, EIGHT, with_trainer=True)


def test_servers_named_by_url_take_none():
    assert split(recipe(8, **{C + "urls": ["http://127.0.0.1:1"]}), EIGHT, with_trainer=True).servers == ()
    assert split(recipe(8, policy__generation__backend="in_process"), EIGHT, with_trainer=True).servers == ()


@pytest.mark.parametrize(
    ("given", "count", "found"),
    [
        (None, 3, ("0", "1", "2")),
        ("", 0, ()),
        ("3,5,7", 3, ("3", "5", "7")),
        (" 3 , 5", 2, ("3", "5")),
        ("0,1,9", 2, ("0", "1")),  # CUDA ends the list at the first that is none
        ("GPU-8932f937-d72c,MIG-7ab1", 2, ("GPU-8932f937-d72c", "MIG-7ab1")),
    ],
)
def test_names_are_those_of_cuda(given, count, found):
    assert visible_gpus({} if given is None else {"CUDA_VISIBLE_DEVICES": given}, count) == found


def test_trainer_processes_see_their_own_gpus_alone_and_none_when_they_compute_on_the_cpu():
    holes = {"CUDA_VISIBLE_DEVICES": "1,3,5,7"}
    assert trainer_variables(recipe(2, 1, 2), holes, 4) == {"CUDA_VISIBLE_DEVICES": "1,3"}
    assert trainer_variables(recipe(2, cluster__device="cpu"), holes, 4) == {"CUDA_VISIBLE_DEVICES": ""}
    assert trainer_variables(recipe(2), {}, 0) == {}


def test_segments_grow_where_memory_comes_and_goes_and_no_process_else_maps_them():
    colocated = {C + "colocated": True, "cluster.device": "cuda"}
    disk, tensor = (recipe(**colocated | {C + "weight_transport": name}) for name in ("disk", "tensor"))
    grow = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert allocator_variables(disk, {}) == grow
    assert allocator_variables(disk, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}) == {}
    assert allocator_variables(tensor, {}) == allocator_variables(recipe(), {}) == {}
    assert allocator_variables(disk.with_values({"cluster.device": "cpu"}), {}) == {}
