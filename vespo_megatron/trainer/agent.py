"""torchrun in a process of its own that ends with the launcher and leaves the reporting to it.

`python -m vespo_megatron.trainer.agent LAUNCHER_PID TORCHRUN_ARGUMENTS…`. torchrun's own traceback about a failed child
says nothing about why it failed; the launcher reads that from the run directory.
"""

from __future__ import annotations

import logging
import signal
import sys

from vespo_megatron.trainer.process import die_with_parent


def main(launcher: int, arguments: list[str]) -> int:
    """Run torchrun; 0 when every trainer process ended well, else 1."""
    die_with_parent(signal.SIGTERM, launcher)
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import errors
    from torch.distributed.elastic.multiprocessing.api import SignalException

    logging.disable(logging.ERROR)
    try:
        run.main(arguments)
    except (errors.ChildFailedError, SignalException):
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
