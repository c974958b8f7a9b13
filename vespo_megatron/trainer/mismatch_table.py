"""The table of `vespo-megatron mismatch`, from the file the workers leave; imports nothing heavy."""

from __future__ import annotations

import json
from pathlib import Path

FILE = "mismatch.json"
ACCOUNT = "account.jsonl"
"""A line per response: its tokens, and the parts of their log π/μ."""
COLUMNS = {
    "mismatch/k3": "k3 KL",
    "mismatch/extreme_token_fraction": "F(2)",
    "mismatch/token_mult_prob_error": "mult. prob. error",
    "mismatch/prob_diff_max": "max |π−μ|",
    "routes/agreement": "route agreement",
    "routes/differing_tokens": "differing tokens",
}
"""Metric → heading of the table."""


def table(run_dir: Path) -> str:
    """The measurements as a markdown table, one row per batch and replay mode, means last."""
    rows = json.loads((run_dir / FILE).read_text())
    names = [name for name in COLUMNS if name in rows[0]]
    lines = [
        "| batch | replay | " + " | ".join(COLUMNS[name] for name in names) + " |",
        "|---" * (len(names) + 2) + "|",
    ]
    lines += [
        f"| {row['batch']} | {row['replay']} | " + " | ".join(f"{row[name]:.5g}" for name in names) + " |"
        for row in rows
    ]
    for mode in ("none", "R3"):
        members = [row for row in rows if row["replay"] == mode]
        means = [sum(row[name] for row in members) / len(members) for name in names]
        lines.append(f"| mean | {mode} | " + " | ".join(f"{mean:.5g}" for mean in means) + " |")
    return "\n".join(lines)
