"""Real SLURM on this machine (four virtual nodes): jobs that end well, and jobs that lose a server."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from vespo_megatron.launch.launcher import agent_environment
from vespo_megatron.recipe.loader import load_recipe
from vespo_megatron.slurm.render import job_script

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny_moe" / "build"
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Environment in which sbatch reaches the cluster."""
    assert shutil.which("slurmctld") and os.geteuid() == 0, "make test-slurm installs what this needs, as root"
    folder = tmp_path_factory.mktemp("cluster")
    script = str(Path(__file__).with_name("cluster.sh"))
    started = subprocess.run([script, "start", str(folder)], capture_output=True, text=True, timeout=120)
    try:
        assert started.returncode == 0, started.stderr
        name, _, value = started.stdout.strip().partition("=")
        yield os.environ | {name: value, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    finally:
        subprocess.run([script, "stop", str(folder)], timeout=120)


def submit(cluster, tmp_path, name, steps, reward="exact_match", restarts=1, **slurm):
    """Submit the CPU example with its server on a node of its own, and small steps; the job's id."""
    options = "".join(f", {key}: {json.dumps(value)}" for key, value in slurm.items())
    recipe = tmp_path / f"{name}.yaml"
    recipe.write_text(
        f"defaults: {ROOT}/examples/tiny_moe/vespo.yaml\n"
        f"grpo: {{max_num_steps: {steps}, val_period: 0, num_prompts_per_step: 8}}\n"
        f"policy: {{model_name: {TINY}/model, generation: {{sglang_cfg: {{max_restarts: {restarts}}}}}}}\n"
        f"data: {{train: {{path: {TINY}/data/train.parquet}}, validation: {{path: null}}}}\n"
        f"env: {{reward: {reward}}}\n"
        f"exp_manager: {{exp_dir: {tmp_path}/runs, name: {name}, resume_if_exists: true}}\n"
        f"slurm: {{rollout_nodes: 1, logs: {tmp_path}/logs{options}}}\n"
    )
    command = [sys.executable, "-m", "vespo_megatron.cli", "slurm", str(recipe), "--submit"]
    done = subprocess.run(command, cwd=tmp_path, env=cluster, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return int(re.search(r"job (\d+)", done.stdout).group(1))


def state(cluster, job):
    shown = subprocess.run(
        ["scontrol", "show", "job", str(job)], env=cluster, capture_output=True, text=True, timeout=60
    )
    return re.search(r"JobState=(\S+)", shown.stdout).group(1), int(re.search(r"Restarts=(\d+)", shown.stdout).group(1))


def wait_until(condition, seconds, what):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.5)


def logs(tmp_path):
    return "\n".join(f"== {path}\n{path.read_text()[-1500:]}" for path in sorted(tmp_path.glob("logs/**/*.log")))


def steps(tmp_path, name, job):
    path = tmp_path / "runs" / name / str(job) / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def processes_of(tmp_path):
    """What still runs of a job: its files are on the command lines and its folder is their working one."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        words = [process.info["cwd"] or "", *(process.info["cmdline"] or [])]
        if any(str(tmp_path) in word for word in words) and process.pid != os.getpid():
            found.append(words)
    return [words for words in found if "pytest" not in " ".join(words) and "slurm.conf" not in " ".join(words)]


NODES = {
    "one node": ["slurm.layout=colocated", "cluster.num_nodes=1"],
    "four nodes": ["slurm.rollout_nodes=2", "cluster.num_nodes=2"],
    "colocated": [
        "slurm.layout=colocated",
        "cluster.num_nodes=4",
        "policy.generation.sglang_cfg.weight_transport=disk",
    ],
    "heterogeneous": ["slurm.layout=heterogeneous", "slurm.rollout_nodes=2", "cluster.num_nodes=2"],
    "shared": ["slurm.rollout_nodes=1", "cluster.num_nodes=1", "slurm.cpus_per_node=1"],
}


@pytest.mark.parametrize("layout", NODES)
def test_slurm_reads_every_layout_and_has_room_for_it(layout, cluster, tmp_path):
    recipe = load_recipe(TINY.parent / "vespo.yaml", [*NODES[layout], f"slurm.logs={tmp_path}"])
    script = tmp_path / "job.sbatch"
    script.write_text(job_script(recipe, TINY.parent / "vespo.yaml"))
    done = subprocess.run(["sbatch", "--test-only", script], env=cluster, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    started = re.findall(r"Job \d+ to start at .* on nodes (\S+)", done.stderr)
    assert started or layout == "heterogeneous", done.stderr


def update(cluster, job, **fields):
    words = ["scontrol", "update", f"JobId={job}", *(f"{name}={value}" for name, value in fields.items())]
    subprocess.run(words, env=cluster, check=True, timeout=60)


def kill_server(but=None):
    """Kill the job's server; its id. Once it is back, with the id it had before."""

    def servers():
        found = [process for process in psutil.process_iter(["cmdline"]) if is_server(process.info["cmdline"] or [])]
        return [process for process in found if process.pid != but]

    wait_until(servers, 60, lambda: "no server")
    (server,) = servers()
    server.kill()
    return server.pid


def is_server(command):
    supervised = any(word.endswith("supervisor.py") for word in command)
    return not supervised and any("launch_sglang" in word for word in command) and "31000" in command


def test_trainer_and_server_on_nodes_of_their_own_run_to_the_end(cluster, tmp_path):
    """With all cores of their node, and in the environment that a run without SLURM gives a trainer process."""
    told = tmp_path / "told.json"
    job = submit(cluster | {"TOLD": str(told)}, tmp_path, "whole", 2, "slow_reward:tell", time="00:20:00")
    wait_until(lambda: state(cluster, job)[0] not in ("PENDING", "RUNNING"), 300, lambda: logs(tmp_path))
    assert state(cluster, job) == ("COMPLETED", 0), logs(tmp_path)
    assert steps(tmp_path, "whole", job) == [1, 2]
    cores, environment = json.loads(told.read_text())
    assert cores == sorted(os.sched_getaffinity(0))
    recipe = load_recipe(tmp_path / "whole.yaml")
    for name, value in agent_environment(recipe, {}).items():
        assert environment.get(name) == value, name
    wait_until(lambda: not processes_of(tmp_path), 30, lambda: str(processes_of(tmp_path)))


def test_one_node_starts_its_own_servers_and_takes_turns_with_them(cluster, tmp_path):
    job = submit(cluster, tmp_path, "shared", 2, time="00:20:00", layout="colocated")
    wait_until(lambda: state(cluster, job)[0] not in ("PENDING", "RUNNING"), 300, lambda: logs(tmp_path))
    assert state(cluster, job) == ("COMPLETED", 0), logs(tmp_path)
    assert steps(tmp_path, "shared", job) == [1, 2]
    assert not list(tmp_path.glob("logs/*/attempt_0/servers_*.log"))
    wait_until(lambda: not processes_of(tmp_path), 30, lambda: str(processes_of(tmp_path)))


def test_at_the_time_limit_the_job_saves_goes_back_into_the_queue_resumes_and_completes(cluster, tmp_path):
    """Trainer and server on nodes of their own. The limit is moved to where the job is in its steps."""
    job = submit(cluster, tmp_path, "limited", 24, "slow_reward:score", time="00:20:00", checkpoint_lead=130)
    started = time.monotonic()
    wait_until(lambda: len(steps(tmp_path, "limited", job)) >= 2, 300, lambda: logs(tmp_path))
    # One to two minutes from now, less than the lead: the warning comes when SLURM next looks, within half a minute.
    update(cluster, job, TimeLimit=int((time.monotonic() - started) // 60) + 2)
    wait_until(lambda: state(cluster, job)[1] >= 1, 200, lambda: logs(tmp_path))
    update(cluster, job, TimeLimit=20)
    done = steps(tmp_path, "limited", job)
    assert 2 <= done[-1] < 24, "the time limit came too late to show anything"
    wait_until(
        lambda: state(cluster, job)[0] not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"),
        600,
        lambda: logs(tmp_path),
    )
    assert state(cluster, job) == ("COMPLETED", 1), logs(tmp_path)
    assert steps(tmp_path, "limited", job) == list(range(1, 25))
    attempts = sorted(path.name for path in (tmp_path / "logs" / str(job)).iterdir())
    assert attempts == ["attempt_0", "attempt_1"]
    assert "stopped with a checkpoint: back into the queue" in logs(tmp_path)
    resumed = f"resuming after step {done[-1]}"
    assert any(resumed in path.read_text() for path in tmp_path.glob("logs/*/attempt_1/trainer_*.log")), resumed
    wait_until(lambda: not processes_of(tmp_path), 30, lambda: str(processes_of(tmp_path)))


def test_a_server_that_dies_for_good_fails_the_job_within_a_minute_and_leaves_no_process(cluster, tmp_path):
    """Killed once it is started again, as the recipe allows, and the job goes on; the second time is the last."""
    job = submit(cluster, tmp_path, "dying", 10_000, time="00:20:00")
    wait_until(lambda: steps(tmp_path, "dying", job), 300, lambda: logs(tmp_path))
    first, done = kill_server(), len(steps(tmp_path, "dying", job))
    wait_until(lambda: len(steps(tmp_path, "dying", job)) >= done + 3, 120, lambda: logs(tmp_path))
    killed = time.monotonic()
    kill_server(but=first)
    wait_until(lambda: state(cluster, job)[0] not in ("RUNNING", "COMPLETING"), 60, lambda: logs(tmp_path))
    assert state(cluster, job)[0] == "FAILED"
    assert time.monotonic() - killed < 60
    assert "a server ended" in logs(tmp_path)
    wait_until(lambda: not processes_of(tmp_path), 30, lambda: str(processes_of(tmp_path)))
