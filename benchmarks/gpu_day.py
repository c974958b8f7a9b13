"""Everything that one GPU can prove, in the order of its worth; each part has a deadline and is told of at once.

    python benchmarks/gpu_day.py --output DIR --parts versions          # half a minute: can it start at all?
    python benchmarks/gpu_day.py --output DIR [--seconds 480]           # the rest
    python benchmarks/gpu_day.py --output DIR --device cpu              # the same scripts, small, without a GPU

No network. What a node lacks beside its CUDA stack is in requirements/gpu.txt, as wheels. In DIR afterwards:
`parts.json` (what ended how, rewritten after every part, so that a run that is cut off still tells), `log.txt` (all
output), `report.jsonl` (figures that tests measured) and `RESULTS.md` (the benchmarks' sections of this card).
Tests of parts that share the card run beside each other, a few at a time; figures come after them, one by one.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_parts import PARTS, Part  # noqa: E402
from benchmarks.results import RESULTS  # noqa: E402

_GRACE_S = 3.0
AT_A_TIME = 4
"""Parts that share the card. Eight were seen to finish nothing: the card takes turns, and so do the host's threads."""


@dataclass
class _Started:
    part: Part
    process: subprocess.Popen[bytes]
    log: Path
    since: float


class Day:
    """Runs parts, and writes what there is to tell after each of them."""

    def __init__(self, output: Path, device: str, seconds: float) -> None:
        self.output, self.device = output, device
        self.ends = time.monotonic() + seconds
        self.found: dict[str, dict[str, object]] = {}
        output.mkdir(parents=True, exist_ok=True)
        self._environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            "VESPO_GPU_REPORT": str(output / "report.jsonl"),
        }

    def run(self, parts: Sequence[Part]) -> bool:
        """Whether all of them succeeded. Parts that may share the card run together, then the others in turn."""
        together = [part for part in parts if part.together]
        alone = [part for part in parts if not part.together]
        with tempfile.TemporaryDirectory() as logs:
            self._run(together, AT_A_TIME, Path(logs))
            self._run(alone, 1, Path(logs))
        return all(found["result"] == "ok" for found in self.found.values())

    def _run(self, parts: Sequence[Part], at_a_time: int, logs: Path) -> None:
        waiting, started = deque(parts), list[_Started]()
        while waiting or started:
            while waiting and len(started) < at_a_time:
                started.append(self._start(waiting.popleft(), at_a_time, logs))
            for one in list(started):
                code = one.process.poll()
                late = time.monotonic() > min(one.since + one.part.seconds, self.ends)
                if code is None and not late:
                    continue
                _end(one.process)
                started.remove(one)
                self._tell(one, "ok" if code == 0 else "too late" if code is None else f"exit {code}")
            time.sleep(0.05)

    def _start(self, part: Part, at_a_time: int, logs: Path) -> _Started:
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // at_a_time))}
        log = logs / f"{part.name}.log"
        command = [sys.executable, *part.command(self.device)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=self._environment | threads | part.environment,
                start_new_session=True,
            )
        return _Started(part, process, log, time.monotonic())

    def _tell(self, one: _Started, result: str) -> None:
        took = time.monotonic() - one.since
        text = one.log.read_text(errors="replace")
        self.found[one.part.name] = {"result": result, "seconds": round(took, 1), "what": one.part.what}
        with (self.output / "log.txt").open("a") as log:
            log.write(f"\n===== {one.part.name}: {result} after {took:.1f} s =====\n{text}")
        (self.output / "parts.json").write_text(json.dumps(self.found, indent=1) + "\n")
        (self.output / "RESULTS.md").write_text(RESULTS.read_text())
        print(f"{one.part.name}: {result} after {took:.1f} s", flush=True)
        if result != "ok":
            print("\n".join("    " + line[:240] for line in text.splitlines()[-12:]), flush=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process and all of its session that are left."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            continue


def main() -> int:
    """0 where every part that was asked for succeeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a folder for what it finds")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--seconds", type=float, default=480, help="for all of it")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS], metavar="PART", help="only these")
    parser.add_argument("--list", action="store_true", help="say what there is, and do nothing")
    arguments = parser.parse_args()
    chosen = [part for part in PARTS if arguments.parts is None or part.name in arguments.parts]
    if arguments.list:
        print("\n".join(f"{part.name:12} {part.seconds:4.0f} s  {part.what}" for part in chosen))
        return 0
    return 0 if Day(arguments.output, arguments.device, arguments.seconds).run(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
