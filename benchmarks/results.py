"""Where benchmark scripts write what they measured: one section each of RESULTS.md, with the machine it ran on."""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime
from pathlib import Path

from vespo_megatron.study.provenance import machine

RESULTS = Path(__file__).parent / "RESULTS.md"
HEADER = "# Measurements\n\nEvery section is written by its script in this folder, on the machine it names.\n"


def record(section: str, markdown: str, path: Path = RESULTS) -> None:
    """Write `markdown` as the section called `section`, replacing what it held; other sections stay as they are.

    Args:
        section: its heading, and its name between the markers.
        markdown: body; the machine and the date are added here.
    """
    begin, end = f"<!-- begin {section} -->", f"<!-- end {section} -->"
    stamp = f"{machine()}; load {os.getloadavg()[0]:.1f}; {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    block = f"{begin}\n## {section}\n\n{stamp}\n\n{markdown.strip()}\n{end}\n"
    text = path.read_text() if path.exists() else HEADER
    pattern = re.compile(re.escape(begin) + r".*?" + re.escape(end) + r"\n?", re.DOTALL)
    text = pattern.sub(lambda _: block, text) if pattern.search(text) else f"{text.rstrip()}\n\n{block}"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)
