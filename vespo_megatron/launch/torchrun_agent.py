"""torchrun in a process of its own that ends with the launcher and leaves the reporting to it.

`python -m vespo_megatron.launch.torchrun_agent LAUNCHER_PID RUN_DIR TORCHRUN_ARGUMENTS…`. torchrun's own traceback
about a failed child says nothing about why it failed; the launcher reads that from the run directory, where this
process notes which rank a signal ended.
"""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path
from typing import Any

from vespo_megatron.machine_errors import explained
from vespo_megatron.run.console import outlive_readers
from vespo_megatron.run.processes import EXIT_EXPLAINED, die_with_parent, note_death

_OWN_SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""What torchrun ends the other workers with."""


def main(launcher: int, run_dir: Path, arguments: list[str]) -> int:
    """Run torchrun; 0 when every trainer process ended well, `EXIT_EXPLAINED` when the first said why not, else 1."""
    die_with_parent(signal.SIGTERM, launcher)
    outlive_readers()
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import errors
    from torch.distributed.elastic.multiprocessing.api import SignalException

    logging.disable(logging.ERROR)
    try:
        run.main(arguments)
    except errors.ChildFailedError as error:
        _note_first_death(run_dir, error.failures)
        first = min(error.failures.values(), key=lambda failure: failure.timestamp)
        return EXIT_EXPLAINED if first.exitcode == EXIT_EXPLAINED else 1
    except SignalException:
        return 1
    except Exception as error:
        if (said := explained(error)) is None:
            raise
        print(f"vespo-megatron: torchrun: {said}", file=sys.stderr)
        return EXIT_EXPLAINED
    return 0


def _note_first_death(run_dir: Path, failures: dict[int, Any]) -> None:
    """torchrun's times are whole seconds, and it kills the workers that outlive SIGTERM by 30 s."""
    first = min(failure.timestamp for failure in failures.values())
    for rank, failure in failures.items():
        if failure.exitcode < 0 and -failure.exitcode not in _OWN_SIGNALS and failure.timestamp < first + 10:
            note_death(run_dir, rank, -failure.exitcode)
            return


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
