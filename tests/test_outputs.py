"""Where commands write: what cannot be written is one error, before the work is done."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from vespo_megatron import cli, outputs

ROOT = Path(__file__).parents[1]
FILES = {
    "kernels": ["kernels", "--output"],
    "predict": ["predict", "a.yaml", "--out"],
    "report": ["report", "run", "--output"],
    "recipe check": ["recipe", "check", "--from", "nemo-rl", "theirs/qwen3_30b_a3b.yaml", "--output"],
}
FOLDERS = {
    "compare": ["compare", "study.yaml", "--report-only", "--output"],
    "convert": ["convert", "model"],
    "data": ["data", "prepare", "aime24", "--from", "model", "--output"],
    "slurm": ["slurm", "a.yaml", "--folder"],
}
"""Commands whose last argument says where they write."""
STUDY = "name: s\nbase: a.yaml\noutput: taken/s\naccuracy: a\nvariants: {one: [grpo.seed=1]}\n"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with what every command reads, and a plain file `taken`."""
    (tmp_path / "a.yaml").write_text("policy: {model_name: some/model}\n")
    (tmp_path / "taken").write_text("")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "study.yaml").write_text(STUDY)
    shutil.copytree(ROOT / "tests" / "recipe" / "nemo_rl", tmp_path / "theirs")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cannot_write(arguments, capsys):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    option = arguments[-2] if arguments[-2].startswith("--") else "TARGET"
    return captured.err.startswith(f"vespo-megatron: {option}: cannot write {arguments[-1]} (")


@pytest.mark.parametrize("command", FILES)
@pytest.mark.parametrize("path", ["folder.png", "taken/a.png", "taken/deeper/a.png", "a" * 300 + ".png"])
def test_a_file_that_cannot_be_written_is_one_error_before_the_work(command, path, place, capsys):
    assert cannot_write([*FILES[command], path], capsys)


@pytest.mark.parametrize("command", FOLDERS)
@pytest.mark.parametrize("path", ["taken/a", "taken/deeper/a", "a" * 300])
def test_a_folder_that_cannot_be_made_is_one_error_before_the_work(command, path, place, capsys):
    assert cannot_write([*FOLDERS[command], path], capsys)


@pytest.mark.parametrize("command", FILES | FOLDERS)
def test_a_place_that_may_not_be_written_is_one_error_before_the_work(command, place, monkeypatch, capsys):
    monkeypatch.setattr(outputs.os, "access", lambda path, mode: not mode & os.W_OK)
    assert cannot_write([*(FILES | FOLDERS)[command], "new/a.png"], capsys)


def test_folders_above_a_file_are_made(place):
    for number, command in enumerate(("kernels", "predict", "report", "recipe check")):
        output = place / str(number) / "deep" / "a.png"
        assert cli.main([*FILES[command], str(output)]) == 0 and output.is_file()


def test_a_study_s_own_output_is_looked_at_before_its_runs(place, capsys):
    for options in ([], ["--report-only"]):
        assert cli.main(["compare", "study.yaml", *options]) == 2
        assert capsys.readouterr().err.startswith(
            "vespo-megatron: s: output: cannot write taken/s (taken is no folder)"
        )


def test_an_output_of_a_check_that_writes_nothing_is_refused(place, capsys):
    assert cli.main(["recipe", "check", "a.yaml", "--output", "new.yaml"]) == 2
    assert "--output: is given without --from" in capsys.readouterr().err and not Path("new.yaml").exists()
