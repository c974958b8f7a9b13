"""What the machine refuses is one message; everything else keeps its traceback."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
from command_line import of_this_run

from vespo_megatron.cli import command_line
from vespo_megatron.machine_errors import explained


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/run/weights"), "/run/weights: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "/run/.lock"), "/run/.lock: Permission denied"),
        (OSError(errno.EROFS, "Read-only file system", "/run"), "/run: Read-only file system"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "ulimit -v"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (RuntimeError("[enforce fail at socket.cc:24] rv != -1. socket: Too many open files"), "ulimit -n"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), "ulimit -v"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "ulimit -v"),
    ],
)
def test_what_the_machine_refuses_is_one_message(error, says, monkeypatch, capsys):
    def refuse(parsed):
        raise error

    monkeypatch.setattr(command_line.train, "run", refuse)
    assert command_line.main(["train", "recipe.yaml"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("vespo-megatron: ") and says in told and "  to do: " in told


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError(errno.ENOENT, "No such file", "x"), ValueError("cannot allocate memory"), RuntimeError("x")],
)
def test_anything_else_keeps_its_traceback(error, monkeypatch):
    def fail(parsed):
        raise error

    monkeypatch.setattr(command_line.train, "run", fail)
    with pytest.raises(type(error)):
        command_line.main(["train", "recipe.yaml"])


def test_a_working_directory_that_is_gone_is_named(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(FileNotFoundError) as caught:
        os.getcwd()
    assert str(explained(caught.value)).startswith("the working directory: is gone")


def test_a_reader_that_has_enough_ends_the_command_quietly(monkeypatch, capsys):
    def stop(parsed):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(command_line.recipe, "run", stop)
    assert command_line.main(["recipe", "keys"]) == 141
    assert capsys.readouterr().err == ""


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("limit", "says"),
    [("-n 24", "ulimit -n"), ("-n 64", "ulimit -n"), ("-n 200", "ulimit -n"), ("-v 1000000", "ulimit -v")],
)
def test_a_limit_of_the_shell_is_one_message_and_leaves_no_process(folder, limit, says):
    command = f"ulimit {limit}; exec {sys.executable} -m vespo_megatron.cli train {folder / 'recipe.yaml'}"
    one_step = " grpo.max_num_steps=1"
    done = subprocess.run(
        ["bash", "-c", command + one_step],
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert says in done.stderr and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert of_this_run(folder) == []
