"""Wait for servers: `python -m vespo_megatron.slurm.wait_for_servers SECONDS URL…`; status 1 at the deadline."""

from __future__ import annotations

import os
import sys
import time

from vespo_megatron.errors import UserError
from vespo_megatron.rollout_sglang.api_key import VARIABLE
from vespo_megatron.rollout_sglang.client.control import call

_PAUSE_S = 1.0


def wait_for(urls: list[str], seconds: float) -> list[str]:
    """The servers that do not answer before the deadline."""
    deadline = time.monotonic() + seconds
    missing = list(urls)
    while missing and time.monotonic() < deadline:
        try:
            call(missing[0], "/model_info", timeout_s=5.0, api_key=os.environ.get(VARIABLE))
            missing.pop(0)
        except UserError:
            time.sleep(_PAUSE_S)
    return missing


if __name__ == "__main__":
    late = wait_for(sys.argv[2:], float(sys.argv[1]))
    if late:
        print(f"no answer in {sys.argv[1]} s: {', '.join(late)}", file=sys.stderr)
    sys.exit(bool(late))
