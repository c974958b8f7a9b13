"""Batch scripts: valid shell, what the recipe asks for in the options, one clear error for what cannot be."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from vespo_megatron.cli import main
from vespo_megatron.errors import UserError
from vespo_megatron.recipe.loader import load_recipe
from vespo_megatron.slurm import node_agent, submit, wait_for_servers
from vespo_megatron.slurm.render import job_script

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "examples" / "qwen3_30b_a3b" / "mismatch" / "grpo.yaml"


COLOCATED = ["slurm.layout=colocated", "policy.generation.sglang_cfg.weight_transport=disk"]

ONE_NODE = ["slurm.layout=colocated", "cluster.num_nodes=1", "policy.generation.sglang_cfg.weight_transport=tensor"]


def script(*overrides):
    return job_script(load_recipe(BASE, overrides), "recipe.yaml")


def options(text):
    return re.findall(r"^#SBATCH (.*)$", text, re.MULTILINE)


@pytest.mark.parametrize(
    "overrides",
    [
        COLOCATED,
        ONE_NODE,
        ["slurm.rollout_nodes=2"],
        ["slurm.layout=heterogeneous", "slurm.rollout_nodes=2", "slurm.rollout_partition=h20"],
        ["slurm.rollout_nodes=1", "slurm.setup=[module load cuda, 'source \"my env/bin/activate\"']"],
        ["slurm.rollout_nodes=1", "slurm.container_image=docker://x y.sqsh", "slurm.container_mounts=[/a:/a,/b:/c]"],
        ["slurm.rollout_nodes=1", "slurm.requeue=false", "slurm.logs=a folder/of mine"],
    ],
    ids=["colocated", "one node", "disaggregated", "heterogeneous", "setup", "container", "no requeue"],
)
def test_every_layout_is_valid_shell(overrides, tmp_path):
    path = tmp_path / "job.sbatch"
    path.write_text(script(*overrides))
    checked = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, timeout=30)
    assert checked.returncode == 0, checked.stderr


def test_the_options_are_the_recipe_s():
    found = options(
        script(
            "slurm.rollout_nodes=2",
            "slurm.account=rl",
            "slurm.partition=gpu",
            "slurm.time=04:00:00",
            "slurm.checkpoint_lead=300",
            "slurm.sbatch_options=[--nice]",
        )
    )
    assert {
        "--nodes=6",
        "--gpus-per-node=8",
        "--account=rl",
        "--partition=gpu",
        "--time=04:00:00",
        "--exclusive",
        "--nice",
        "--signal=B:USR1@300",
        "--requeue",
    } <= set(found)
    assert "--nodes=4" in options(script(*COLOCATED))
    shared = options(script("slurm.rollout_nodes=2", "slurm.cpus_per_node=32"))
    assert "--cpus-per-task=32" in shared and "--exclusive" not in shared


def test_colocated_servers_give_their_memory_to_the_trainer_and_one_node_starts_its_own():
    several = script(*COLOCATED)
    assert "policy.generation.sglang_cfg.colocated=true" in several and "cli serve" in several
    one = script(*ONE_NODE)
    assert "policy.generation.sglang_cfg.colocated=true" in one
    assert "cli serve" not in one and "sglang_cfg.urls" not in one and "cli train" in one


def test_every_server_has_a_number_of_its_own_and_every_step_its_image():
    text = script("slurm.rollout_nodes=3", "slurm.container_image=train", "slurm.rollout_container_image=serve")
    assert "policy.generation.sglang_cfg.first_server=$((2 * index))" in text
    servers, trainer = (line for line in text.splitlines() if line.lstrip().startswith("srun "))
    assert "--container-image=serve" in servers and "--container-image=train" in trainer
    assert script("slurm.rollout_nodes=1", "slurm.container_image=one").count("--container-image=one") == 2


def test_torchrun_is_told_what_the_recipe_says():
    recipe = load_recipe(BASE, ["slurm.rollout_nodes=1"])
    command = node_agent.torchrun(recipe, "10.0.0.1:20001", "7.0", ["recipe.yaml", "grpo.seed=3"])
    assert {"--nnodes=4", "--nproc-per-node=8", "--rdzv-endpoint=10.0.0.1:20001"} <= set(command)
    assert command[command.index("vespo_megatron.cli") :] == [
        "vespo_megatron.cli",
        "train",
        "recipe.yaml",
        "grpo.seed=3",
    ]


ADDRESS = """
scontrol() { echo "   NodeAddr=$GIVEN NodeHostName=n1 Version=22.05"; }
getent() { [[ $GIVEN == gone ]] || echo "$RESOLVED STREAM $2"; }
hostname() { echo "10.1.2.3 fd00::1"; }
"""


@pytest.mark.parametrize(
    ("given", "resolved", "address"),
    [
        ("10.0.0.7", "", "10.0.0.7"),
        ("127.0.0.1", "", "127.0.0.1"),
        ("fd00::7", "", "fd00::7"),
        ("node7", "10.0.0.7", "10.0.0.7"),
        ("node7", "127.0.1.1", "10.1.2.3"),  # Debian's /etc/hosts, on the node itself
        ("gone", "", "gone"),
    ],
)
def test_a_node_s_address_is_one_that_others_reach(given, resolved, address):
    function = re.search(r"^address\(\) \{.*?^\}", script("slurm.rollout_nodes=1"), re.MULTILINE | re.DOTALL).group()
    done = subprocess.run(
        ["bash", "-uc", f"{ADDRESS}\n{function}\naddress n1"],
        capture_output=True,
        text=True,
        timeout=30,
        env={"GIVEN": given, "RESOLVED": resolved, "PATH": "/usr/bin:/bin"},
    )
    assert done.stdout.strip() == address, done.stderr


def test_the_gate_shows_the_servers_their_key(monkeypatch):
    asked = []
    monkeypatch.setenv("VESPO_SGLANG_API_KEY", "secret")
    monkeypatch.setattr(wait_for_servers, "call", lambda url, path, **given: asked.append(given["api_key"]))
    assert wait_for_servers.wait_for(["http://127.0.0.1:1"], 5.0) == []
    assert asked == ["secret"]


def test_a_hetjob_has_two_parts_with_their_own_nodes():
    text = script(
        "slurm.layout=heterogeneous", "slurm.rollout_nodes=2", "slurm.partition=h100", "slurm.rollout_partition=h20"
    )
    first, second = text.split("#SBATCH hetjob")
    assert {"--nodes=4", "--partition=h100"} <= set(options(first))
    assert {"--nodes=2", "--partition=h20"} <= set(options(second))
    assert "--het-group=0" in text and "--het-group=1" in text


def test_a_comparison_is_a_script_per_value_and_a_report_that_waits_for_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "sbatch"
    fake.write_text('#!/bin/bash\necho "$@" >> calls\nwc -l < calls\n')
    fake.chmod(0o755)
    command = [
        "slurm",
        str(BASE),
        "slurm.rollout_nodes=1",
        "--compare",
        "policy.router_replay.mode=none,R2",
        "--submit",
    ]
    assert main(command) == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [Path(call.split()[-1]).name for call in calls] == [
        "mismatch_grpo_none.sbatch",
        "mismatch_grpo_R2.sbatch",
        "mismatch_grpo_report.sbatch",
    ]
    assert "--dependency=afterany:1:2" in calls[2]
    modes = [
        load_recipe(tmp_path / "slurm" / f"mismatch_grpo_{v}.yaml").policy.router_replay.mode for v in ("none", "R2")
    ]
    assert modes == ["none", "R2"]
    report = (tmp_path / "slurm" / "mismatch_grpo_report.sbatch").read_text()
    assert "mismatch_grpo_none/*" in report and "mismatch_grpo_R2/*" in report
    assert capsys.readouterr().out.count("job") == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["slurm.rollout_nodes=0"], "slurm.rollout_nodes: is 0"),
        (["slurm.layout=colocated"], "weight_transport: is distributed with slurm.layout=colocated on 4 nodes"),
        (ONE_NODE[:2], "weight_transport: is distributed with slurm.layout=colocated on 1 nodes"),
        (["slurm.layout=both"], "slurm.layout: is 'both'"),
        (["policy.generation.backend=in_process", "slurm.rollout_nodes=1"], "policy.generation.backend"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        script(*overrides)


def test_a_comparison_without_values_and_a_missing_sbatch_are_errors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--compare"):
        submit.prepare(BASE, ["slurm.rollout_nodes=1"], compare="grpo.seed")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="sbatch was not found"):
        submit.submit(submit.prepare(BASE, ["slurm.rollout_nodes=1"]))
