"""Wait for servers: `python -m vespo_megatron.slurm.wait_for_servers SECONDS FILE…`; status 1 at the deadline.

Each file is the one in which a `vespo-megatron serve` says that its servers are ready. Nothing is sent to them: until
they listen, somebody else may, and would be shown the key.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

_PAUSE_S = 1.0


def wait_for(files: Sequence[str], seconds: float, pause_s: float = _PAUSE_S) -> list[str]:
    """The files that are not there at the deadline."""
    deadline = time.monotonic() + seconds
    while missing := [file for file in files if not Path(file).exists()]:
        if time.monotonic() > deadline:
            break
        time.sleep(pause_s)
    return missing


if __name__ == "__main__":
    late = wait_for(sys.argv[2:], float(sys.argv[1]))
    if late:
        print(f"not there in {sys.argv[1]} s: {', '.join(late)}", file=sys.stderr)
    sys.exit(bool(late))
