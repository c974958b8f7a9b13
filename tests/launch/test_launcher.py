"""The launcher: one message per failure, the right exit status, and no process left, whatever happens.

Real processes; the trainer in them is replaced by one that does as it is told.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vespo_megatron.launch import launcher
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.run.heartbeat import read_rank_statuses
from vespo_megatron.run.processes import wait_until

WORKER = """
import os, signal, sys, time
from pathlib import Path
from vespo_megatron.errors import UserError
from vespo_megatron.launch import worker
from vespo_megatron.run.heartbeat import Heartbeat
from vespo_megatron.run.stopping import StopRequest

def train(recipe, run_dir):
    rank, what = int(os.environ["RANK"]), recipe.exp_manager.name
    (run_dir / f"pids_{rank}.partial").write_text(f"{os.getpid()} {os.getppid()}")
    (run_dir / f"pids_{rank}.partial").rename(run_dir / f"pids_{rank}")
    print(f"rank {rank} has {os.environ['OMP_NUM_THREADS']} threads", flush=True)
    if what == "finish":
        return
    if what == "talks":
        for number in range(1000):
            print("a line that is longer than a pipe is patient", number, file=[sys.stdout, sys.stderr][number % 2])
        (run_dir / f"done_{rank}").touch()
        return
    if what == "full":  # the disk: nothing more is created, and why cannot be noted
        (run_dir / "errors").write_text("in the way")
        raise UserError("holds nothing more", where="the disk")
    if what == "explain" and rank == 1:
        raise UserError("has no experts left", where="layer 3", fix="keep some")
    if what == "explain":
        time.sleep(0.5)
        raise RuntimeError("connection closed by peer")
    if what == "crash" and rank == 0:
        raise RuntimeError("boom")
    if what == "vanish" and rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if what in ("saves", "late"):  # asked to stop, a rank that has trained saves and ends, or is too slow
        heartbeat, stop = Heartbeat(run_dir, rank), StopRequest(run_dir)
        heartbeat.step = 3
        heartbeat.beat()
        while what == "late" or not stop.asked():
            time.sleep(0.05)
        stop.note_stopped(3, "checkpoints/step_3")
        return
    if what in ("stubborn", "outlives"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(300)

worker.run = lambda recipe, run_dir, work: train(recipe, run_dir)
sys.exit(worker.main(Path(sys.argv[1])))
"""

DRIVER = """
import os, sys
from vespo_megatron import cli
from vespo_megatron.rollout_sglang.server.ports import hold_ports
from vespo_megatron.rollout_sglang.server.server_group import ServerGroup
from vespo_megatron.rollout_sglang.server.server_process import ServerProcess
from vespo_megatron.launch import launcher
from vespo_megatron.launch import preflight

def servers(recipe, run_dir):
    if recipe.exp_manager.name not in ("server", "outlives"):
        return contextlib.nullcontext(launcher._NoServers())
    code = "import time; time.sleep(6); raise MemoryError('out of KV cache')"
    log = run_dir / "servers" / "server_0.log"
    (port,) = hold_ports("127.0.0.1", 0, 1)
    group = ServerGroup([ServerProcess(port, [sys.executable, "-c", code], dict(os.environ), log)], [])
    (run_dir / "pids_server").write_text(str(group.servers[0].process_group))
    (run_dir / "port").write_text(str(port.number))
    return group

import contextlib
launcher.WORKER_MODULE = "obedient_worker"
launcher._AGENT_GRACE_S = 2.0
launcher._servers = servers
preflight.check = lambda recipe: None
import vespo_megatron.study.report
vespo_megatron.study.report.write_report = lambda runs, output: output
sys.exit(cli.main(["train", *sys.argv[1:]]))
"""


class Launched:
    """`vespo-megatron train` in a process, and what it started."""

    def __init__(self, folder: Path, what: str, before: str = "") -> None:
        (folder / "obedient_worker.py").write_text(WORKER)
        recipe = folder / "recipe.yaml"
        recipe.write_text(
            "policy: {model_name: m}\n"
            f"cluster: {{gpus_per_node: 2, stop_timeout: {8 if what == 'late' else 60}}}\n"
            f"exp_manager: {{exp_dir: {folder}/runs, name: {what}}}\n"
        )
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
        self.run_dir = folder / "runs" / what / "version_0"
        self.process = subprocess.Popen(
            [sys.executable, "-c", before + DRIVER, str(recipe)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=folder,
        )

    def wait_until_training(self) -> None:
        """Until both workers run."""
        assert wait_until(
            lambda: len(list(self.run_dir.glob("pids_[01]"))) == 2 or self.process.poll() is not None, 150
        )
        assert self.process.poll() is None, self.process.communicate()

    def finish(self, timeout: float = 150) -> tuple[int, str, str]:
        """Exit status, output, errors."""
        output, errors = self.process.communicate(timeout=timeout)
        return self.process.returncode, output, errors

    def pids(self) -> set[int]:
        """The agent, its workers and the servers."""
        return {int(pid) for file in self.run_dir.glob("pids_*") for pid in file.read_text().split()}

    def alive(self) -> set[int]:
        """Those that still run."""
        return {pid for pid in self.pids() if is_running(pid)}


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture
def start(tmp_path):
    launched = []

    def start_it(what: str, before: str = "") -> Launched:
        launched.append(Launched(tmp_path, what, before))
        return launched[-1]

    yield start_it
    for each in launched:
        each.process.kill()
        for pid in each.alive():
            os.kill(pid, signal.SIGKILL)


def test_a_run_ends_with_its_directory_recipe_and_report(start):
    run = start("finish")
    status, output, errors = run.finish()
    assert (status, errors) == (0, "")
    assert f"run directory: {run.run_dir}" in output and "report.html" in output
    assert (run.run_dir / "recipe.yaml").exists()
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert f"rank 1 has {threads} threads" in output
    assert run.pids() and not run.alive()


def test_an_explained_error_of_one_rank_is_the_only_message(start):
    run = start("explain")
    status, _, errors = run.finish()
    assert status == 2
    assert errors == "vespo-megatron: layer 3: has no experts left\n  to do: keep some\n"
    assert wait_until(lambda: not run.alive(), 20), run.alive()


def test_an_unexplained_error_is_shown_once_with_its_rank(start):
    run = start("crash")
    status, _, errors = run.finish()
    assert status == 1
    assert "rank 0 failed" in errors and errors.count("RuntimeError: boom") == 1
    assert "ChildFailedError" not in errors
    assert wait_until(lambda: not run.alive(), 20), run.alive()


def test_a_worker_killed_without_a_word_is_named(start):
    run = start("vanish")
    status, _, errors = run.finish()
    assert status == 1 and errors.startswith("vespo-megatron: rank 0 was ended by SIGKILL\n")
    assert wait_until(lambda: not run.alive(), 20), run.alive()


def test_a_server_that_dies_ends_the_run_with_the_end_of_its_log(start):
    run = start("server")
    status, _, errors = run.finish()
    assert status == 2
    assert (
        re.search(r"server http://127\.0\.0\.1:\d+: SGLang died", errors) and "MemoryError: out of KV cache" in errors
    )
    assert wait_until(lambda: not run.alive(), 20), run.alive()


def test_a_server_s_port_is_held_until_the_last_worker_has_ended_though_the_launcher_was_killed(start):
    """A worker that still is there sends its key where its server was."""
    run = start("outlives")
    run.wait_until_training()
    port, server = int((run.run_dir / "port").read_text()), int((run.run_dir / "pids_server").read_text())
    workers = {int((run.run_dir / f"pids_{rank}").read_text().split()[0]) for rank in (0, 1)}
    run.process.kill()
    assert wait_until(lambda: not is_running(server), 20)
    assert workers <= run.alive() and not can_be_taken(port)
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    assert wait_until(lambda: can_be_taken(port), 20)


def can_be_taken(port: int) -> bool:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("127.0.0.1", port))
            taken.listen()
        except OSError:
            return False
    return True


@pytest.mark.parametrize(
    ("what", "signum", "expected"),
    [("train", signal.SIGTERM, 143), ("train", signal.SIGINT, 130), ("stubborn", signal.SIGTERM, 143)],
)
def test_a_signal_stops_everything_within_seconds(start, what, signum, expected):
    run = start(what)
    run.wait_until_training()
    started = time.monotonic()
    run.process.send_signal(signum)
    status, _, errors = run.finish(timeout=60)
    assert status == expected
    assert errors == f"vespo-megatron: stopped by {signal.Signals(signum).name}\n"
    assert wait_until(lambda: not run.alive(), 20), run.alive()
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_run_that_has_trained_saves_first_and_says_that_it_can_be_resumed(start, signum):
    run = start("saves")
    run.wait_until_training()
    assert wait_until(lambda: len(read_rank_statuses(run.run_dir)) == 2, 20)
    run.process.send_signal(signum)
    status, _, errors = run.finish(timeout=60)
    assert status == 75
    assert errors == f"vespo-megatron: stopped by {signal.Signals(signum).name} after step 3: checkpoints/step_3\n"
    assert wait_until(lambda: not run.alive(), 20), run.alive()


def test_a_terminal_that_closes_asks_more_than_once_and_hears_no_answer(start):
    run = start("saves")
    run.wait_until_training()
    assert wait_until(lambda: len(read_rank_statuses(run.run_dir)) == 2, 20)
    run.process.stdout.close()
    run.process.stderr.close()
    for _ in range(2):
        run.process.send_signal(signal.SIGHUP)
    assert run.process.wait(60) == 75
    assert wait_until(lambda: not run.alive(), 20), run.alive()


def test_under_nohup_a_terminal_may_close(start):
    run = start("saves", before="import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n")
    run.wait_until_training()
    assert wait_until(lambda: len(read_rank_statuses(run.run_dir)) == 2, 20)
    run.process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert not (run.run_dir / "stop").exists() and run.process.poll() is None


def test_a_run_goes_on_when_nobody_reads_what_it_prints(start):
    """As `vespo-megatron train … 2>&1 | head -1`."""
    run = start("talks")
    assert run.process.stdout.readline().startswith("run directory: ")
    run.process.stdout.close()
    run.process.stderr.close()
    assert run.process.wait(150) == 0
    assert sorted(path.name for path in run.run_dir.glob("done_*")) == ["done_0", "done_1"]


def test_a_rank_that_cannot_note_why_it_failed_says_so(start):
    run = start("full")
    status, _, errors = run.finish()
    assert status == 2
    assert "vespo-megatron: rank 0: the disk: holds nothing more\n" in errors or "rank 1: the disk" in errors
    assert "could not note why; its message is above" in errors and "Traceback" not in errors


@pytest.mark.parametrize("impatient", [False, True])
def test_saving_has_a_deadline_and_a_second_signal_does_not_wait_for_it(start, impatient):
    run = start("late")
    run.wait_until_training()
    assert wait_until(lambda: len(read_rank_statuses(run.run_dir)) == 2, 20)
    run.process.send_signal(signal.SIGTERM)
    assert wait_until(lambda: (run.run_dir / "stop").exists(), 20)
    if impatient:
        run.process.send_signal(signal.SIGTERM)
    status, _, errors = run.finish(timeout=60)
    assert status == 143 and errors == "vespo-megatron: stopped by SIGTERM\n"
    assert wait_until(lambda: not run.alive(), 20), run.alive()


def test_a_launcher_killed_outright_takes_everything_with_it(start):
    run = start("train")
    run.wait_until_training()
    run.process.kill()
    assert wait_until(lambda: not run.alive(), 30), run.alive()


def test_a_killed_agent_takes_its_workers_with_it(start):
    run = start("train")
    run.wait_until_training()
    agent = int((run.run_dir / "pids_0").read_text().split()[1])
    os.kill(agent, signal.SIGKILL)
    status, _, errors = run.finish(timeout=60)
    assert status == 1 and "ended without a word" in errors
    assert wait_until(lambda: not run.alive(), 20), run.alive()


# ---- what is decided without a process ---------------------------------------------------------------------------


def recipe_on(processes: int, urls: list[str] | None = None) -> Recipe:
    recipe = Recipe().with_values({"cluster.gpus_per_node": processes, "policy.generation.sglang_cfg.urls": urls or []})
    return recipe


def test_what_the_user_set_in_the_environment_stays():
    environment = launcher.agent_environment(recipe_on(1), {"OMP_NUM_THREADS": "7", "GLOO_SOCKET_IFNAME": "eth9"})
    assert environment["OMP_NUM_THREADS"] == "7" and environment["GLOO_SOCKET_IFNAME"] == "eth9"
    assert "GOMP_SPINCOUNT" in environment
    assert "GOMP_SPINCOUNT" not in launcher.agent_environment(recipe_on(1), {"OMP_WAIT_POLICY": "passive"})


@pytest.mark.parametrize("variable", ["GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"])
def test_collectives_keep_to_the_loopback_unless_something_is_elsewhere(variable):
    several = recipe_on(1).with_values({"cluster.num_nodes": 2})
    assert launcher.agent_environment(recipe_on(1, ["http://127.0.0.1:30000"]), {})[variable] == "lo"
    assert launcher.agent_environment(recipe_on(1), {})[variable] == "lo"
    assert variable not in launcher.agent_environment(recipe_on(1, ["http://10.0.0.7:30000"]), {})
    assert variable not in launcher.agent_environment(several, {})


def test_more_processes_than_cores_still_get_a_thread():
    assert launcher.agent_environment(recipe_on(1000), {})["OMP_NUM_THREADS"] == "1"


def test_the_command_line_names_every_process(tmp_path):
    command = launcher.agent_command(recipe_on(3), tmp_path, "mismatch")
    assert command[-5:] == [str(tmp_path), "3", launcher.WORKER_MODULE, str(tmp_path), "mismatch"]
