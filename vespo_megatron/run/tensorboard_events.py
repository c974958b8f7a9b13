"""A run's numbers as TensorBoard events, written step by step by the thread that has them.

TensorBoard's own writer has a thread that dies of a full disk with a traceback, and a reader takes nothing after an
event that was cut short: after a failure the next step begins another file.
"""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

Histogram = tuple[Sequence[float], Any]
"""(edges [bins + 1], counts float64 [bins]) as in `losses.metrics.MetricSums`."""


class TensorBoardEvents:
    """The event files of one attempt at a run; events of steps after `start_step` in earlier files are void."""

    def __init__(self, folder: Path, start_step: int) -> None:
        self._folder, self._start_step = folder, start_step
        self._file: IO[bytes] | None = None
        self._number = itertools.count()

    def write(self, record: Mapping[str, Any], histograms: Mapping[str, Histogram]) -> None:
        """One step, on the disk when this returns.

        Args:
            record: `step`, and metrics as numbers or None.
            histograms: metric → how many values are in which bin.

        Raises:
            OSError: some of it could not be written.
        """
        from torch.utils.tensorboard.summary import histogram_raw, scalar

        from vespo_megatron.losses.diagnostics import raw_histogram

        step = record["step"]
        shown = {name: value for name, value in record.items() if name not in ("step", "wall_time")}
        summaries = [scalar(name, value) for name, value in shown.items() if value is not None]
        raw = {name: raw_histogram(*values) for name, values in histograms.items()}
        summaries += [histogram_raw(name, **values) for name, values in raw.items() if values is not None]
        try:
            file = self._file or self._open()
            for summary in summaries:
                self._write_event(file, step=step, summary=summary)
            file.flush()
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """What was not written before is lost."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None

    def _open(self) -> IO[bytes]:
        from tensorboard.compat.proto.event_pb2 import SessionLog

        self._folder.mkdir(parents=True, exist_ok=True)
        about = f"{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.{next(self._number)}"
        self._file = (self._folder / f"events.out.tfevents.{about}").open("wb")
        self._write_event(self._file, file_version="brain.Event:2")
        if self._start_step:
            log = SessionLog(status=SessionLog.START)
            self._write_event(self._file, step=self._start_step + 1, session_log=log)
            self._start_step = 0  # another file of this attempt voids nothing
        return self._file

    def _write_event(self, file: IO[bytes], **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        RecordWriter(file).write(Event(wall_time=time.time(), **fields).SerializeToString())
