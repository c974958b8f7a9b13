"""Who hangs, and since when: from signs of life and stacks, by a clock of the watchdog's own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from vespo_megatron.run.heartbeat import RankStatus, clear_heartbeats, heartbeat_folder, read_rank_statuses
from vespo_megatron.run.processes import wait_until
from vespo_megatron.run.stacks import Frame, NoStack, Whereabouts, whereabouts
from vespo_megatron.run.watchdog import Stalled, Watchdog, culprits

HERE = os.uname().nodename
CALL = Frame("trainer/loop.py", 10, "reduce")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def say(run_dir, rank: int, count: int, phase: str = "train", step: int = 3, pid: int = 2**22 + 1) -> None:
    heartbeat_folder(run_dir).mkdir(exist_ok=True)
    status = {"rank": rank, "pid": pid, "host": HERE, "count": count, "step": step, "phase": phase}
    (heartbeat_folder(run_dir) / f"rank_{rank}.json").write_text(json.dumps(status).ljust(512))


def watching(tmp_path, timeout: float = 60.0, patience: float = 100.0) -> tuple[Watchdog, Clock]:
    clock = Clock()
    return Watchdog(tmp_path, timeout, patience, clock), clock


def test_progress_is_left_alone_and_silence_is_not(tmp_path):
    watchdog, clock = watching(tmp_path)
    for count in range(5):
        say(tmp_path, 0, count)
        clock.now += 50
        watchdog.check()
    clock.now += 61
    with pytest.raises(Stalled, match=r"rank 0 hangs in phase train of step 3: no progress for 61 s") as stalled:
        watchdog.check()
    assert stalled.value.exit_code == 70
    assert "rank 0 hangs" in (heartbeat_folder(tmp_path) / "stall.txt").read_text()


def test_a_phase_that_waits_for_servers_has_more_time(tmp_path):
    watchdog, clock = watching(tmp_path)
    say(tmp_path, 0, 1, phase="generate")
    watchdog.check()
    clock.now += 159
    watchdog.check()
    clock.now += 2
    with pytest.raises(Stalled, match="phase generate"):
        watchdog.check()


def test_a_rank_that_has_ended_or_not_begun_is_not_watched(tmp_path):
    watchdog, clock = watching(tmp_path)
    say(tmp_path, 0, 1)
    watchdog.check()
    (heartbeat_folder(tmp_path) / "rank_0.json").write_text("")
    clock.now += 1000
    watchdog.check()
    clear_heartbeats(tmp_path)
    assert read_rank_statuses(tmp_path) == {}


def test_no_timeout_watches_nothing(tmp_path):
    watchdog, clock = watching(tmp_path, timeout=0)
    say(tmp_path, 0, 1)
    watchdog.check()
    clock.now += 1e9
    watchdog.check()


# ---- who is to blame ---------------------------------------------------------------------------------------------


def blamed(states: dict[int, object], steps: dict[int, int] | None = None) -> list[int]:
    statuses = {rank: RankStatus(rank, 1, HERE, 1, (steps or {}).get(rank, 3), "train") for rank in states}
    return culprits(statuses, states)


WAITS = Whereabouts("all_reduce", CALL)


def test_the_rank_without_a_stack_is_to_blame():
    assert blamed({0: WAITS, 1: NoStack("left no stack (the process is stopped)"), 2: WAITS}) == [1]


def test_a_rank_on_another_machine_is_not_to_blame_for_its_missing_stack_whatever_it_says():
    there = NoStack("on node7", elsewhere=True)
    assert blamed({0: WAITS, 1: there, 2: NoStack("left no stack (on another machine's disk)")}) == [2]
    assert blamed({0: WAITS, 1: there, 2: Whereabouts("", CALL)}) == [2]


def test_the_rank_outside_every_collective_is_to_blame():
    assert blamed({0: WAITS, 1: WAITS, 2: Whereabouts("", CALL)}) == [2]


def test_the_rank_that_is_a_step_behind_is_to_blame():
    assert blamed({0: WAITS, 1: WAITS, 2: WAITS}, steps={0: 4, 1: 3, 2: 4}) == [1]


def test_the_rank_in_another_collective_than_the_rest_is_to_blame():
    assert blamed({0: WAITS, 1: Whereabouts("broadcast", CALL), 2: WAITS}) == [1]


def test_when_all_are_in_the_same_collective_nobody_is_named():
    assert blamed({0: WAITS, 1: WAITS}) == []


# ---- stacks ------------------------------------------------------------------------------------------------------

DUMP = """\
Thread 0x00007f01 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 331 in wait
  File "/usr/lib/python3.11/threading.py", line 973 in _bootstrap

Current thread 0x00007f02 (most recent call first):
  File "/x/torch/distributed/distributed_c10d.py", line 2876 in broadcast
  File "/x/torch/distributed/c10d_logger.py", line 83 in wrapper
  File "/x/torch/distributed/distributed_c10d.py", line 3680 in broadcast_object_list
  File "/x/torch/distributed/c10d_logger.py", line 83 in wrapper
  File "/y/vespo_megatron/trainer/loop.py", line 203 in on_controller
  File "/y/vespo_megatron/trainer/loop.py", line 60 in train
"""


def test_the_collective_and_who_called_it_are_read_from_the_stacks():
    found = whereabouts(DUMP)
    assert found.collective == "broadcast_object_list"
    assert str(found) == "broadcast_object_list called by on_controller (vespo_megatron/trainer/loop.py:203)"


def test_waiting_for_a_peers_message_is_a_collective_too():
    dump = 'Current thread 0x1 (most recent call first):\n  File "/x/megatron/p2p.py", line 7 in recv_forward\n'
    assert whereabouts(dump, lambda file, line: "    req.wait()\n").collective == "wait"
    assert whereabouts(dump, lambda file, line: "    compute()\n").collective == ""


def test_an_empty_dump_is_no_stack():
    assert whereabouts("").frame is None


@pytest.mark.parametrize(
    "hang", ["ctypes.PyDLL(None).sleep(60)", "time.sleep(60)", "os.kill(os.getpid(), signal.SIGSTOP)"]
)
def test_a_rank_leaves_its_stack_even_from_within_c(tmp_path, hang):
    code = f"""
    import ctypes, os, signal, sys, time
    from pathlib import Path
    from vespo_megatron.run.heartbeat import Heartbeat
    def stuck():
        {hang}
    heartbeat = Heartbeat(Path(sys.argv[1]), 3)
    heartbeat.step = 2
    heartbeat.enter("train")
    stuck()
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)])
    try:
        assert wait_until(
            lambda: 3 in read_rank_statuses(tmp_path) and read_rank_statuses(tmp_path)[3].phase == "train", 30
        )
        watchdog, clock = watching(tmp_path)
        watchdog.check()
        clock.now += 100
        with pytest.raises(Stalled) as stalled:
            watchdog.check()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    message = str(stalled.value)
    assert "rank 3 hangs in phase train of step 2: no progress for 100 s" in message
    assert ("the process is stopped" if "STOP" in hang else "stuck") in message


def test_under_another_launcher_the_rank_that_watches_ends_itself_with_the_report(tmp_path):
    program = """
    import sys, time
    from pathlib import Path
    from vespo_megatron.recipe.schema import Recipe
    from vespo_megatron.run.heartbeat import Heartbeat
    from vespo_megatron.run.watchdog import watched
    recipe, run_dir = Recipe().with_values({"cluster.watchdog_timeout": 0.5}), Path(sys.argv[1])
    heartbeat = Heartbeat(run_dir, 0)
    heartbeat.step = 4
    heartbeat.enter("train")
    with watched(recipe, run_dir):
        time.sleep(60)
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 70
    assert ended.stderr.startswith("vespo-megatron: rank 0 hangs in phase train of step 4"), ended.stderr
