"""Every command on a page is known here, and does what the page says: the quick ones now, the others nightly."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_pages import ELSEWHERE, KNOWN, NIGHTLY, PAGES, QUICK, ROOT, commands_of

from vespo_megatron import cli
from vespo_megatron.cli.shared import split_overrides
from vespo_megatron.recipe.loader import load_recipe

PROGRAM = "vespo-megatron"
OURS = [(page, command) for page in PAGES for command in commands_of(page) if command.startswith(PROGRAM)]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_is_known_and_every_known_one_is_there(page):
    assert commands_of(page) == list(KNOWN.get(page, {})), f"put it into tests/documented/command_pages.py: {page}"


def words_of(command: str, **variables: str) -> list[str]:
    """As a shell gives them to a program; a redirection is the shell's own."""
    plain = command.partition(" > ")[0].removeprefix(PROGRAM)
    expanded = subprocess.run(
        ["bash", "-uc", f"printf '%s\\0' {plain}"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        env=os.environ | variables,
    )
    return expanded.stdout.decode().split("\0")[:-1]


@pytest.mark.parametrize(("page", "command"), OURS)
def test_its_options_are_known_and_its_recipe_is_one(page, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    elsewhere = {"SCRATCH": "/scratch", "RUN": "/run", "DATA": "/data", "MODEL": "/model", "RUNS": "/runs"}
    for name, value in elsewhere.items():
        monkeypatch.setenv(name, value)
    parser = cli.build_parser()
    overrides, words = split_overrides(parser, words_of(command))
    parsed = parser.parse_args(words)
    for name in ("recipe", "left", "right"):
        if (path := getattr(parsed, name, None)) is not None and path not in ("mine.yaml", "recipe.yaml"):
            load_recipe(path, overrides)


@pytest.mark.parametrize("page", [page for page in KNOWN if QUICK in KNOWN[page].values()])
def test_quick_ones_do_what_they_are_there_for(page, monkeypatch, tmp_path, capsys):
    """In their order, in a folder of their own that has the repository's files."""
    for name in ("examples", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    for command in [command for command, kind in KNOWN[page].items() if kind == QUICK]:
        if command.startswith("export "):
            for assignment in command.split()[1:]:
                monkeypatch.setenv(*assignment.split("=", 1))
            continue
        with contextlib.suppress(SystemExit):
            assert cli.main(words_of(command)) == 0, (command, capsys.readouterr().err)
            assert capsys.readouterr().out.strip(), command


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("page", [page for page in KNOWN if NIGHTLY in KNOWN[page].values()])
def test_all_that_can_be_executed_here_are_in_a_fresh_clone(page, tmp_path):
    clone = tmp_path / "vespo_megatron"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    (clone / "examples" / "tiny_moe" / "build").symlink_to(ROOT / "examples" / "tiny_moe" / "build")
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(clone),
        "SCRATCH": str(tmp_path),
    }
    script = [f"{PROGRAM} train examples/tiny_moe/vespo.yaml"] if page == "README.md" else []  # what `make train` does
    script += [command for command, kind in KNOWN[page].items() if kind != ELSEWHERE]
    done = subprocess.run(
        ["bash", "-euxc", "\n".join(script)], cwd=clone, env=environment, capture_output=True, text=True, timeout=7000
    )
    assert done.returncode == 0, done.stderr[-3000:]
