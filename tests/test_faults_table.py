"""`docs/faults.md`: every row names a test that exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "faults.md").read_text().splitlines()
    if line.startswith("|") and not line.startswith(("|---", "| fault |"))
]


@cache
def functions(file: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:60])
def test_a_row_has_a_fault_an_outcome_and_a_test_that_exists(row):
    fault, outcome, test = row
    assert fault and outcome
    file, name = re.fullmatch(r"`(tests/.+\.py)::(test_\w+)`", test).groups()
    assert name in functions(ROOT / file), f"{file} has no {name}"
