"""The day with a GPU, tried without one: the driver tells of every part, and every figure's script runs, small."""

from __future__ import annotations

import json
import runpy
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_day  # noqa: E402
from benchmarks.gpu_parts import PARTS, Part  # noqa: E402

FIGURES = [part for part in PARTS if "--record" in part.on_gpu]


def python(name, code, seconds=20.0, together=False):
    return Part(name, f"{name} for a test", ("-c", code), seconds, together)


def test_every_part_is_told_of_when_it_ends_whatever_becomes_of_the_others(tmp_path, capsys):
    stubborn = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(77)']); print('begun', flush=True); "
        "time.sleep(77)"
    )
    parts = [
        python("first", "print('one')", together=True),
        python("broken", "raise SystemExit(3)", together=True),
        python("late", stubborn, 1.5),
        python("last", "import os; print(os.environ['VESPO_GPU_REPORT'])"),
    ]
    since = time.monotonic()
    assert not gpu_day.Day(tmp_path, "cpu", 60).run(parts)
    assert time.monotonic() - since < 30
    found = json.loads((tmp_path / "parts.json").read_text())
    results = {name: told["result"] for name, told in found.items()}
    assert results == {"first": "ok", "broken": "exit 3", "late": "too late", "last": "ok"}
    log = (tmp_path / "log.txt").read_text()
    assert "one\n" in log and "begun" in log and str(tmp_path / "report.jsonl") in log
    assert "late: too late" in capsys.readouterr().out
    left = [
        each for each in psutil.process_iter(["cmdline"]) if "time.sleep(77)" in " ".join(each.info["cmdline"] or [])
    ]
    assert left == []


def test_what_there_is_no_time_for_is_cut_off(tmp_path):
    since = time.monotonic()
    assert not gpu_day.Day(tmp_path, "cpu", 1.0).run([python(name, "import time; time.sleep(30)") for name in "ab"])
    assert time.monotonic() - since < 15
    assert all(told["result"] == "too late" for told in json.loads((tmp_path / "parts.json").read_text()).values())


def test_every_part_s_files_exist_and_the_list_names_them(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_day.py", "--output", "x", "--list"])
    assert gpu_day.main() == 0
    listed = capsys.readouterr().out
    for part in PARTS:
        assert part.name in listed
        files = [argument for argument in part.command("cuda") if argument.endswith(".py")]
        assert files and all((ROOT / file).is_file() for file in files)


@pytest.mark.parametrize("part", FIGURES, ids=lambda part: part.name)
def test_a_figure_s_script_runs_small(part, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    script, *arguments = part.command("cpu")
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(script, run_name="__main__")
    assert "|---" in capsys.readouterr().out
