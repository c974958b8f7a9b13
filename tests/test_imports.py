"""Imports point one way, and what a person waits for is quick."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "datasets", "megatron", "sglang", "matplotlib", "numpy", "omegaconf", "pydantic")


def run_python(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60, cwd=ROOT)


def test_imports_point_one_way():
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    outcome = run_python("-c", code)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert "5 kept, 0 broken" in outcome.stdout


@pytest.mark.parametrize(
    "command",
    [
        ["-c", "import vespo_megatron"],
        ["-m", "vespo_megatron.cli", "--help"],
        ["-m", "vespo_megatron.cli", "--version"],
    ],
)
def test_importing_and_help_answer_in_under_half_a_second(command):
    def timed() -> float:
        started = time.perf_counter()
        outcome = run_python(*command)
        assert outcome.returncode == 0, outcome.stderr
        return time.perf_counter() - started

    assert min(timed() for _ in range(5)) < 0.5


def test_help_imports_nothing_heavy():
    code = (
        "import sys, contextlib, io\n"
        "from vespo_megatron.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "    main(['train', '--help'])\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    outcome = run_python("-c", code)
    assert outcome.stdout.strip() == "[]", outcome.stdout + outcome.stderr


def test_reading_a_recipe_needs_neither_torch_nor_transformers():
    code = (
        "import sys\n"
        "import vespo_megatron.recipe.loader, vespo_megatron.recipe.rules, vespo_megatron.launch.launcher\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'megatron') if name in sys.modules])"
    )
    assert run_python("-c", code).stdout.strip() == "[]"
