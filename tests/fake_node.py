"""A node with GPUs that are not there: how many, how large, and what each process holds of them.

`FakeNode` is a ledger in a folder, which processes share; who takes more than there is gets a MemoryError, and all can
see it. `write_interpreter` makes a Python that has SGLang and CUDA as far as the launcher can tell, whose server is
`FakeServer`; `fake_worker.py` is a trainer process on such a GPU.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import sys
import threading
import time
from pathlib import Path

TESTS = Path(__file__).parent
NODE = "VESPO_FAKE_NODE"
GIB = 80.0
"""Of each GPU."""
WEIGHTS, GRAPHS = 10.0, 2.0
"""GiB that a server takes for these; its cache is what `mem_fraction_static` leaves."""


class FakeNode:
    """See the module. Events are `[who, process id, GPU, what, GiB]`, in the order they happened on the node."""

    def __init__(self, folder: str | Path) -> None:
        self._path = Path(folder) / "ledger.jsonl"

    @classmethod
    def here(cls) -> FakeNode:
        """The one that this process runs on."""
        return cls(os.environ[NODE])

    @property
    def lacks_a_server(self) -> bool:
        """Whether one has died and is not back."""
        return (self._path.parent / "died").exists() and not (self._path.parent / "back").exists()

    def note(self, who: str, gpu: str, what: str, gib: float = 0.0) -> None:
        """`gib` more, or less, for `what`; MemoryError, which is noted, where living processes hold the rest."""
        with self._path.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            held = sum(event[4] for event in self._events(file) if event[2] == gpu and _lives(event[1]))
            refused = gib > 0 and held + gib > GIB
            event = [who, os.getpid(), gpu, f"no room for {what}" if refused else what, 0.0 if refused else gib]
            file.write(json.dumps(event) + "\n")
        if refused:
            raise MemoryError(f"{who}: GPU {gpu} holds {held:.1f} GiB of {GIB:g}, and {gib:.1f} for {what} are wanted")

    def events(self) -> list[list]:
        """All of them."""
        with self._path.open("a+") as file:
            return self._events(file)

    def on_gpu(self, gpu: str) -> list[str]:
        """For instance `server 0: +weights`; what comes in a row of one process is one entry."""
        lines: list[str] = []
        for who, _, place, what, gib in self.events():
            if place == gpu:
                sign = "+" if gib > 0 else "-" if gib < 0 else ""
                if lines and lines[-1].startswith(f"{who}: ") and sign and lines[-1].split(": ")[1][0] == sign:
                    lines[-1] += f" {sign}{what}"
                else:
                    lines.append(f"{who}: {sign}{what}")
        return lines

    @staticmethod
    def _events(file) -> list[list]:
        file.seek(0)
        return [json.loads(line) for line in file]


def _lives(process_id: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def write_interpreter(folder: Path, *, gpus: int) -> str:
    """The path of a Python with so many GPUs."""
    path = folder / "python_with_gpus"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {gpus} "$@"\n')
    path.chmod(0o755)
    return str(path)


def answer_probe(gpus: int) -> None:
    """As `server.environment.probe_environment` asks."""
    found = {"device": "cuda", "torchvision": True, "plugin": True, "num_gpus": gpus, "folder": str(TESTS)}
    print(json.dumps(found))


def serve(arguments: list[str]) -> None:
    """Be a server: take the share that the flags say, at once, and keep it until asked."""
    sys.path[:0] = [str(TESTS.parent), str(TESTS / "rollout_sglang")]
    from fault_server import FaultServer

    flags = dict(itertools.pairwise(arguments))
    gpus, node = os.environ["CUDA_VISIBLE_DEVICES"].split(","), FakeNode.here()
    name = f"server {int(flags['--random-seed']) % 10}"  # of a recipe whose seed ends in 0
    saves = "--enable-memory-saver" in arguments
    graphs = os.environ.get("SGLANG_MEMORY_SAVER_CUDA_GRAPH") == "1"
    share = {
        "weights": WEIGHTS,
        "kv_cache": GIB * float(flags["--mem-fraction-static"]) - WEIGHTS,
        "cuda_graph": GRAPHS,
    }
    lacking: set[str] = set()
    died, back = (Path(os.environ[NODE]) / mark for mark in ("died", "back"))
    if died.exists():
        back.touch()

    def move(tags: list[str], sign: int) -> None:
        for tag in tags:
            if saves and (tag != "cuda_graph" or graphs):
                for gpu in gpus:
                    node.note(name, gpu, tag, sign * share[tag])

    for tag, gib in share.items():
        for gpu in gpus:
            node.note(name, gpu, tag, gib)

    import torch
    from safetensors.torch import load_file

    from vespo_megatron.rollout_sglang.api_key import take_from_environment
    from vespo_megatron.rollout_sglang.checksum import tensor_checksum
    from vespo_megatron.rollout_sglang.held_port import listen_at
    from vespo_megatron.rollout_sglang.plugin.actions import MANIFEST, SEES

    weights = load_file(Path(flags["--model-path"]) / "model.safetensors")

    def described(tensor: torch.Tensor) -> str:
        return str(tensor.dtype).removeprefix("torch.") + " " + ",".join(f"0:{size}" for size in tensor.shape)

    class FakeServer(FaultServer):
        """Weights by disk, and memory by tag; what is released is lost, and nothing is generated without it."""

        def answer(self, handler, body):
            path = handler.path.partition("?")[0]
            if path == "/weights_checker":
                action, _, argument = body["action"].partition(" ")
                if action == SEES:
                    values = {"sees": "yes" if Path(argument).exists() else "no"}
                elif action == MANIFEST:
                    values = {each: described(tensor) for each, tensor in weights.items()}
                else:
                    values = {each: f"{tensor_checksum(each, tensor):016x}" for each, tensor in weights.items()}
                return self._send(
                    handler, 200, {"ranks": [{"checksums": values, "parallelism_info": [{"tp_rank": 0}]}]}
                )
            if path == "/update_weights_from_disk" and "weights" not in lacking:
                for file in Path(body["model_path"]).glob("*.safetensors"):
                    weights.update(load_file(file))
            elif path == "/update_weights_from_disk" or (path == "/generate" and lacking):
                return self._send(handler, 500, {"error": {"message": f"{sorted(lacking)} are released"}})
            elif path == "/generate" and not body["rid"][0].startswith("probe"):
                node.note(name, gpus[0], "generate")
                until = time.monotonic() + 60
                while node.lacks_a_server and time.monotonic() < until:
                    time.sleep(0.05)  # a rollout that lasts until the launcher has seen whose turn it is
            elif path == "/release_memory_occupation":
                die_once(name)
                move(body["tags"], -1)
                lacking.update(body["tags"])
                if "weights" in body["tags"]:
                    weights.update({each: torch.full_like(tensor, float("nan")) for each, tensor in weights.items()})
            elif path == "/resume_memory_occupation":
                move(body["tags"], +1)
                lacking.difference_update(body["tags"])
            return super().answer(handler, body)

    calls = 0

    def die_once(name: str) -> None:
        """As `VESPO_FAKE_DEATH` says, `server 1 2`: this server, when it is asked for its memory the second time."""
        nonlocal calls
        calls += 1
        if os.environ.get("VESPO_FAKE_DEATH") == f"{name} {calls}" and not died.exists():
            died.touch()
            node.note(name, gpus[0], "dies")
            os._exit(1)

    listener = listen_at(flags["--host"], int(flags["--port"]))
    key = take_from_environment() or ""
    FakeServer(listener=listener, api_key=key, version="0.5.23", device="cuda", startup_time=os.getpid())
    threading.Event().wait()


if __name__ == "__main__":
    count, *rest = sys.argv[1:]
    if rest[0] == "-c":
        answer_probe(int(count))
    else:
        serve(rest)
