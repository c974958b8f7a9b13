"""What tests on a GPU measure: printed, and appended as JSON lines to the file that VESPO_GPU_REPORT names."""

from __future__ import annotations

import json
import os
from typing import Any


def report(**told: Any) -> None:
    """One line: names and numbers, or texts that stand for one."""
    print(told, flush=True)
    if path := os.environ.get("VESPO_GPU_REPORT"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(told) + "\n")
