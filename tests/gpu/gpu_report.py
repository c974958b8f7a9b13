"""What tests on a GPU measure: printed, and appended as JSON lines to the file that VESPO_GPU_REPORT names."""

from __future__ import annotations

import json
import os


def report(name: str, value: object) -> None:
    """A number, or a text that stands for one."""
    print(f"{name}: {value:.6g}" if isinstance(value, float) else f"{name}: {value}", flush=True)
    if path := os.environ.get("VESPO_GPU_REPORT"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, "value": value}) + "\n")
