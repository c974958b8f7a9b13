"""Batch scripts: valid shell, what the recipe asks for in the options, one clear error for what cannot be."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import vespo_megatron
from vespo_megatron.cli import main
from vespo_megatron.errors import UserError
from vespo_megatron.recipe.loader import load_recipe
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.run.run_directory import READY_FILE
from vespo_megatron.slurm import node_agent, submit, wait_for_servers
from vespo_megatron.slurm.render import job_script
from vespo_megatron.slurm.submit import prepare

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


def test_the_ranks_of_a_node_are_told_their_place_and_where_they_meet():
    recipe = load_recipe(BASE, ["slurm.rollout_nodes=1"])
    ranks = node_agent.ranks(recipe, "10.0.0.1:20001", 2)
    assert [rank["RANK"] for rank in ranks] == [str(16 + number) for number in range(8)]
    assert ranks[3] == {
        "RANK": "19",
        "WORLD_SIZE": "32",
        "LOCAL_RANK": "3",
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "20001",
    }
    assert node_agent.ranks(recipe, "[fd00::7]:20001", 0)[0]["MASTER_ADDR"] == "fd00::7"


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


def test_the_gate_opens_with_the_files_of_all_servers(tmp_path):
    files = [str(tmp_path / name) for name in ("first", "second")]
    (tmp_path / "first").touch()
    assert wait_for_servers.wait_for(files, 0.1, pause_s=0.01) == files[1:]
    (tmp_path / "second").touch()
    assert wait_for_servers.wait_for(files, 0.1, pause_s=0.01) == []


@pytest.mark.parametrize("ready", [True, False])
def test_the_trainer_starts_when_the_servers_have_said_that_they_are_ready(tmp_path, monkeypatch, ready):
    """And nobody asks them, with the key, while another may listen in their place."""
    monkeypatch.chdir(tmp_path)  # where the script goes
    values = {
        "exp_manager.exp_dir": str(tmp_path / "runs"),
        "exp_manager.name": "a run",
        "policy.generation.sglang_cfg.startup_timeout": 2.0,
    }
    folder = tmp_path / "runs" / "a run_servers_0.0" / "7" / READY_FILE.parent
    folder.mkdir(parents=True)
    (folder / READY_FILE.name).touch()  # of an earlier job
    says = f'touch "{folder}/{READY_FILE.name}"' if ready else "true"
    serves = f"[[ $* == *' serve '* ]] && {{ {says}; exec sleep 5; }}"
    seen = run_script(recipe_script("disaggregated", values), tmp_path, srun=serves, gate=True)
    assert ("vespo_megatron.slurm.node_agent" in seen) == ready


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


HOSTILE = ["$(touch {file})", "`touch {file}`", '"; touch {file}; "', "'; touch {file}; '", "a b", "-x", "a#b"]


@pytest.mark.parametrize("key", ["exp_manager.name", "exp_manager.version", "exp_manager.exp_dir", "slurm.logs"])
@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize("layout", ["disaggregated", "colocated"])
def test_nothing_that_stands_in_a_recipe_is_executed(layout, key, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the script goes
    value = value.format(file="touched")
    seen = run_script(recipe_script(layout, {key: value}), tmp_path)
    assert not list(tmp_path.rglob("touched"))
    assert "vespo_megatron.cli" in seen
    if key == "exp_manager.version":
        assert f"{key}={value}" in seen
    if key == "exp_manager.name" and layout == "disaggregated":
        assert f"{key}={value}_servers_0.0" in seen


@pytest.mark.parametrize("key", ["account", "partition", "qos", "time"])
@pytest.mark.parametrize("value", ["x\ntouch y", 'x" --uid=0', "x'y", "x\\", "x\ry", "x\u2028y"])
def test_an_option_of_sbatch_stays_one(key, value):
    with pytest.raises(UserError, match=f"slurm.{key}: is .*\n  expected: one line without quotes"):
        recipe_script("disaggregated", {f"slurm.{key}": value})
    assert f'#SBATCH --{key}="a b # c"\n' in recipe_script("disaggregated", {f"slurm.{key}": "a b # c"})


def test_further_options_of_sbatch_are_a_line_each():
    with pytest.raises(UserError, match="slurm.sbatch_options"):
        recipe_script("disaggregated", {"slurm.sbatch_options": ["--exclusive\ntouch x"]})


@pytest.mark.parametrize("value", ["../elsewhere", "/elsewhere", "a/../../b", "a\nb", "", "."])
@pytest.mark.parametrize("key", ["name", "version"])
def test_a_run_stays_within_its_folder(key, value):
    with pytest.raises(UserError, match=f"exp_manager.{key}.*no folder within another"):
        Recipe().with_values({f"exp_manager.{key}": value})


def test_a_run_whose_name_has_a_folder_has_scripts_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = ["slurm.rollout_nodes=1", "exp_manager.name=study/a"]
    (job,) = prepare(BASE, overrides, folder=tmp_path / "scripts")
    assert job.name == "study_a.sbatch" and "#SBATCH --job-name=study_a\n" in job.read_text()


def recipe_script(layout: str, values: dict) -> str:
    nodes = {"slurm.layout": layout, "slurm.rollout_nodes": 1, "cluster.num_nodes": 1}
    transport = {"policy.generation.sglang_cfg.weight_transport": "disk"}
    return job_script(load_recipe(BASE).with_values(nodes | transport | values), "recipe.yaml")


def run_script(text: str, folder: Path, *, srun: str = "true", gate: bool = False) -> list[str]:
    """Run a job's script where SLURM's commands are stand-ins; every word that srun was given.

    Without its `gate`, the servers are not waited for.
    """
    programs = folder / "bin"
    programs.mkdir()
    seen = folder / "words"
    for name, body in {
        "srun": f'printf "%s\\0" "$@" >> {seen}\n{srun}',
        "scontrol": 'if [[ $2 == hostnames ]]; then printf "n1\\nn2\\n"; else echo "NodeAddr=127.0.0.1 "; fi',
        **({} if gate else {"sleep": "true"}),
    }.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    if not gate:
        text = re.sub(r"^.*-m vespo_megatron.slurm.wait_for_servers .*$", "true &", text, flags=re.MULTILINE)
    subprocess.run(
        ["bash", "-c", text],
        env={
            "PATH": f"{programs}:/usr/bin:/bin",
            "PYTHONPATH": str(Path(vespo_megatron.__file__).parents[1]),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n[1-2]",
        },
        cwd=folder,
        capture_output=True,
        timeout=60,
    )
    return seen.read_bytes().decode().split("\0") if seen.exists() else []
