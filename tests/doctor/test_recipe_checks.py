"""`preflight`: every recipe of the 30B model is judged in seconds, and what would fail on a node is named."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from vespo_megatron.cli import main
from vespo_megatron.doctor import recipe_checks
from vespo_megatron.doctor.findings import FAIL, OK, WARN
from vespo_megatron.doctor.recipe_checks import Node, gpus, memory, network, storage, versions
from vespo_megatron.errors import UserError
from vespo_megatron.recipe.loader import load_recipe
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.rollout_sglang.server import cuda_stack
from vespo_megatron.rollout_sglang.server.cuda_stack import CudaStack, check_exchange, obstacles

EXAMPLES = Path(__file__).parents[2] / "examples" / "qwen3_30b_a3b"
FOLDERS = ("grid", "async", "mismatch", "ablations")
RECIPES = sorted(path for name in FOLDERS for path in (EXAMPLES / name).glob("*.yaml") if path.stem != "async")
H100 = Node.of("h100-80x8")
SERVERS = "policy.generation.sglang_cfg."


def of(findings, name):
    return next(finding for finding in findings if finding.name == name)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_30b_recipe_is_judged_by_a_card_that_is_not_here(path):
    recipe = load_recipe(path)
    found = [*recipe_checks.rules(recipe), *gpus(recipe, H100), *memory(recipe, H100)]
    assert [finding for finding in found if finding.level == FAIL] == []
    assert of(found, "memory of a trainer process").detail.startswith("fits: ")
    assert of(found, "memory of a server").detail.startswith("fits, ")


def test_the_command_answers_within_ten_seconds(capsys, tmp_path):
    since = time.monotonic()
    recipe = str(EXAMPLES / "grid" / "vespo_n8.yaml")
    given = ["preflight", recipe, "--fake-gpu", "h100-80x8", "--json", f"exp_manager.exp_dir={tmp_path}"]
    assert main(given) == 0
    assert time.monotonic() - since < 10
    report = json.loads(capsys.readouterr().out)
    assert report["failed"] == 0
    assert {"recipe", "GPUs of a trainer node", "servers' ports", "run directory", "trainer's PyTorch"} <= {
        finding["name"] for finding in report["findings"]
    }


def test_what_does_not_fit_is_a_failure_and_a_status(capsys, tmp_path):
    recipe = load_recipe(EXAMPLES / "grid" / "vespo_n8.yaml")
    small = Node.of("h100-80x4")
    found = list(gpus(recipe, small))
    assert all(finding.level == FAIL and "there are 4" in finding.detail for finding in found) and len(found) == 2
    tight = recipe.with_values({"policy.megatron_cfg.expert_model_parallel_size": 1})
    assert of(memory(tight, H100), "memory of a trainer process").detail.startswith("does not fit: ")
    given = ["preflight", str(EXAMPLES / "grid" / "vespo_n8.yaml"), "--fake-gpu", "h100-80x4"]
    assert main([*given, f"exp_manager.exp_dir={tmp_path}"]) == 1


@pytest.mark.parametrize("given", ["h100-80", "8xh100-80", "h100-80x0", "h100x8"])
def test_a_card_that_is_none_is_refused(given):
    with pytest.raises(UserError):
        Node.of(given)


def test_servers_on_the_trainer_s_node_are_counted_with_it():
    recipe = Recipe().with_values({"cluster.gpus_per_node": 4, SERVERS + "num_servers": 2, "cluster.device": "cuda"})
    (found,) = gpus(recipe, H100)
    assert found.detail == "trainer on 0, 1, 2, 3; server 0 on 4; server 1 on 5"


def test_a_colocated_job_s_servers_take_the_trainer_s_own():
    recipe = Recipe().with_values(
        {"cluster.gpus_per_node": 8, SERVERS + "num_servers": 2, "cluster.device": "cuda", "slurm.layout": "colocated"}
    )
    (found,) = gpus(recipe, H100)
    assert found.level == OK and found.detail.endswith("server 0 on 0; server 1 on 1")


NEW, OLD, CPU = (
    CudaStack("2.14.1", "13.0", "2.29.3"),
    CudaStack("2.11.0+cu130", "13.0", "2.28.9"),
    CudaStack("2", None, None),
)


@pytest.mark.parametrize(
    ("transport", "trainer", "server", "reason"),
    [
        ("distributed", NEW, NEW, None),
        ("distributed", NEW, OLD, "NCCL 2.29.3 of the trainer and 2.28.9 of the servers make no communicator"),
        ("tensor", NEW, NEW, None),
        ("tensor", NEW, OLD, "memory handles of torch 2.14 are not those of torch 2.11"),
        ("tensor", OLD, CudaStack("2.11.0+cu128", "12.8", "2.28.9"), "of cuda 13.0 are not those of cuda 12.8"),
        ("tensor", OLD, CPU, "the servers' interpreter has torch 2, built for the CPU"),
        ("disk", NEW, CPU, None),
    ],
)
def test_interpreters_that_cannot_exchange_weights_are_told_apart(transport, trainer, server, reason):
    found = "; ".join(obstacles(trainer, server, transport))
    assert found.endswith(reason) if reason else not found


def test_servers_do_not_start_where_weights_could_not_reach_them(monkeypatch):
    monkeypatch.setattr(cuda_stack, "stack_of", {"/theirs": OLD, "/ours": NEW}.get)
    with pytest.raises(UserError, match="weight_transport: is distributed, and NCCL 2.29.3"):
        check_exchange("/theirs", "/ours", "distributed")
    check_exchange("/ours", "/ours", "distributed")
    check_exchange("/theirs", "/ours", "disk")


def test_the_recipe_s_own_transport_decides_and_a_fake_card_only_warns(monkeypatch):
    monkeypatch.setattr(recipe_checks, "stack_of", lambda python: OLD if python == "/theirs" else NEW)
    recipe = Recipe().with_values({SERVERS + "python": "/theirs", "cluster.device": "cuda"})
    here = Node(("0",), None, True)
    assert of(versions(recipe, here), "weights by distributed (the recipe's)").level == FAIL
    assert of(versions(recipe, H100), "weights by distributed (the recipe's)").level == WARN
    assert of(versions(recipe, here), "weights by disk").level == OK


def test_an_interface_that_is_not_there_is_named_with_those_that_are():
    (found, _) = network(Recipe().with_values({"cluster.network_interface": "ib7"}))
    assert found.level == FAIL and "ib7 is none of" in found.detail and "lo" in found.detail
    assert of(network(Recipe().with_values({"cluster.network_interface": "lo"})), "network interface").level == OK


def test_a_model_that_loads_too_slowly_is_told_before_its_servers_are_given_up(tiny_recipe, tmp_path, monkeypatch):
    recipe = tiny_recipe.with_values({"exp_manager.exp_dir": str(tmp_path / "new" / "runs")})
    assert {finding.level for finding in storage(recipe)} == {OK}
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(recipe_checks, "_reading", lambda path: 100.0)
    slow = of(storage(recipe), "model")
    assert slow.level == WARN and "startup_timeout" in slow.fix
