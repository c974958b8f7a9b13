"""Weight updates of a model of more than 1 GB into a real SGLang server, against moving the same bytes and no more.

    python benchmarks/bench_weight_sync.py --record

An update is all of `WeightSync.update`: pause, gather from the stream, hashing on both sides, transport, SGLang's
loading, checks, flush, resume. Its rival, in the same run and in the same bucket sizes, is for

- distributed: a gloo broadcast of the bytes to one other process;
- tensor: a copy into shared memory, and from it in another process, two buffers in turn;
- disk: a copy of a file of the bytes (`shutil.copyfile`; written before, and still in the page cache).

Memory is the largest resident set of this process during updates above the one before them, sampled every 5 ms. The
stream is this process's own tensors: what a gather from other ranks adds is in `tests/parallel`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "hidden_act": "silu",
    "eos_token_id": 1,
    "torch_dtype": "float32",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "use_sliding_window": False,
}
TRANSPORTS = ("distributed", "tensor", "disk")
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transports", nargs="+", default=TRANSPORTS, choices=TRANSPORTS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bucket-mib", type=int, default=64)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = measure(Path(folder), arguments)
    print(text)
    if arguments.record:
        from results import record

        record("Weight sync", text)


def measure(folder: Path, arguments: argparse.Namespace) -> str:
    """Markdown."""
    from vespo_megatron.recipe.schema import Recipe
    from vespo_megatron.rollout_sglang import connect, launch_servers

    tensors = make_model(folder / "model")
    total = sum(tensor.nbytes for tensor in tensors.values())
    server = "policy.generation.sglang_cfg"
    recipe = Recipe().with_values(
        {
            "policy.model_name": str(folder / "model"),
            "policy.precision": "float32",
            "policy.max_total_sequence_length": 256,
            "cluster.device": "cpu",
            f"{server}.weight_folder": str(folder / "weights"),
            f"{server}.weight_bucket_bytes": arguments.bucket_mib * MIB,
            f"{server}.max_total_tokens": 1024,
        }
    )
    rows = []
    with launch_servers(recipe, folder) as servers:
        for transport in arguments.transports:
            each = recipe.with_values({f"{server}.weight_transport": transport})
            engine = connect(each, servers.urls)
            rival = RIVALS[transport]
            engine.update_weights(change(tensors), engine.weight_version + 1)  # connects
            updates, raws, checks, peaks = [], [], [], []
            for _ in range(arguments.repeats):
                items = change(tensors)
                with PeakMemory() as memory:
                    engine.update_weights(items, engine.weight_version + 1)
                updates.append(engine.sync.seconds["total"])
                checks.append(engine.sync.seconds["check"])
                peaks.append(memory.extra)
            engine.close()
            with rival(tensors, engine.sync.bucket_bytes, folder) as move:
                move()
                raws = [timed(move) for _ in range(arguments.repeats)]
            rows.append((transport, *map(statistics.median, (updates, checks, raws)), max(peaks)))
            print(rows[-1], flush=True)
    lines = [
        f"{total / 1e9:.2f} GB of float32 in {len(tensors)} tensors (Qwen3-MoE of {CONFIG['num_hidden_layers']} layers "
        f"and {CONFIG['num_experts']} experts), `weight_bucket_bytes` {arguments.bucket_mib} MiB, one SGLang 0.5.23 "
        f"server on the same CPU; medians of {arguments.repeats}.",
        "",
        "| transport | update, s | of which the check | GB/s | bytes alone, s | GB/s | ratio | memory, buckets |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for transport, update, check, raw, peak in rows:
        lines.append(
            f"| {transport} | {update:.2f} | {check:.2f} | {total / update / 1e9:.2f} | {raw:.2f} | "
            f"{total / raw / 1e9:.2f} | {raw / update:.0%} | {peak / arguments.bucket_mib / MIB:.2f} |"
        )
    hashing, packing = passes(tensors, arguments.bucket_mib * MIB)
    lines += [
        "",
        f"Hashing these bytes takes {hashing:.2f} s here, copying them into a bucket {packing:.2f} s. "
        "Beside the transport an update makes four such passes: the trainer packs and hashes, SGLang copies buckets "
        "into its fused weights, and the check hashes what the server holds, from memory once more.",
    ]
    return "\n".join(lines)


def passes(tensors: dict[str, torch.Tensor], bucket: int) -> tuple[float, float]:
    """Seconds of hashing every tensor, and of copying each into a buffer of a bucket's size."""
    from vespo_megatron.rollout_sglang.checksum import tensor_checksum

    buffer = torch.zeros(max(bucket, max(tensor.nbytes for tensor in tensors.values())), dtype=torch.uint8)

    def pack() -> None:
        for tensor in tensors.values():
            buffer[: tensor.nbytes].copy_(tensor.reshape(-1).view(torch.uint8))

    hashing = timed(lambda: [tensor_checksum(name, tensor) for name, tensor in tensors.items()])
    return hashing, timed(pack)


def make_model(folder: Path) -> dict[str, torch.Tensor]:
    """Random weights by name, and the Hugging Face folder of them."""
    from safetensors.torch import save_file

    from vespo_megatron.megatron.hf_mapping import expected_tensors
    from vespo_megatron.recipe.model_shape import read_shape

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator) * 0.02
        for name, shape in expected_tensors(read_shape(folder)).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def change(tensors: dict[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """Every tensor another one than in the last update."""
    for tensor in tensors.values():
        tensor.mul_(1.001)
    return list(tensors.items())


def timed(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


class PeakMemory:
    """The largest resident set while inside, above the one at the start."""

    def __enter__(self) -> PeakMemory:
        self._process = psutil.Process()
        self._before = self._peak = self._process.memory_info().rss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.005):
            self._peak = max(self._peak, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def extra(self) -> int:
        return self._peak - self._before


# ---- the rivals --------------------------------------------------------------------------------------------------


def pieces(total: int, size: int) -> list[int]:
    """`total` bytes in buckets of `size`."""
    return [size] * (total // size) + ([total % size] if total % size else [])


class Broadcast:
    """gloo on loopback, to one process that only receives."""

    def __init__(self, tensors: dict[str, torch.Tensor], size: int, folder: Path) -> None:
        self._pieces = pieces(sum(tensor.nbytes for tensor in tensors.values()), size)
        self._store = f"file://{folder}/store"

    def __enter__(self) -> Callable[[], None]:
        self._commands = multiprocessing.get_context("spawn").Queue()
        self._child = multiprocessing.get_context("spawn").Process(
            target=receive, args=(self._store, self._pieces, self._commands), daemon=True
        )
        self._child.start()
        dist.init_process_group("gloo", init_method=self._store, rank=0, world_size=2)
        self._buffer = torch.ones(max(self._pieces), dtype=torch.uint8)
        return self._move

    def _move(self) -> None:
        self._commands.put(True)
        for size in self._pieces:
            dist.broadcast(self._buffer[:size], src=0)
        dist.barrier()

    def __exit__(self, *_: object) -> None:
        self._commands.put(False)
        self._child.join(10)
        dist.destroy_process_group()


def receive(store: str, sizes: list[int], commands) -> None:
    """The other side of `Broadcast`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=1, world_size=2)
    buffer = torch.empty(max(sizes), dtype=torch.uint8)
    while commands.get():
        for size in sizes:
            dist.broadcast(buffer[:size], src=0)
        dist.barrier()


class SharedCopy:
    """In and out of two shared buffers in turn."""

    def __init__(self, tensors: dict[str, torch.Tensor], size: int, folder: Path) -> None:
        self._tensors, self._pieces = tensors, pieces(sum(tensor.nbytes for tensor in tensors.values()), size)

    def __enter__(self) -> Callable[[], None]:
        context = multiprocessing.get_context("spawn")
        self._buffers = [torch.zeros(max(self._pieces), dtype=torch.uint8).share_memory_() for _ in range(2)]
        self._full, self._free = context.Queue(), context.Queue()
        self._child = context.Process(
            target=copy_out, args=(self._buffers, self._pieces, self._full, self._free), daemon=True
        )
        self._child.start()
        self._source = torch.ones(max(self._pieces), dtype=torch.uint8)
        return self._move

    def _move(self) -> None:
        for index, size in enumerate(self._pieces):
            if index >= 2:
                self._free.get()
            self._buffers[index % 2][:size].copy_(self._source[:size])
            self._full.put(index)
        for _ in range(min(2, len(self._pieces))):
            self._free.get()

    def __exit__(self, *_: object) -> None:
        self._full.put(None)
        self._child.join(10)


def copy_out(buffers: list[torch.Tensor], sizes: list[int], full, free) -> None:
    """The other side of `SharedCopy`: into memory of as many bytes as the weights."""
    torch.set_num_threads(1)
    target = torch.zeros(sum(sizes), dtype=torch.uint8)
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    while (index := full.get()) is not None:
        target[starts[index] : starts[index] + sizes[index]].copy_(buffers[index % 2][: sizes[index]])
        free.put(index)


class FileCopy:
    """A file of the bytes is read and written once, as in an update."""

    def __init__(self, tensors: dict[str, torch.Tensor], size: int, folder: Path) -> None:
        self._pieces = pieces(sum(tensor.nbytes for tensor in tensors.values()), size)
        self._folder = folder

    def __enter__(self) -> Callable[[], None]:
        source = torch.ones(max(self._pieces), dtype=torch.uint8).numpy()
        with (self._folder / "raw").open("wb") as file:
            for size in self._pieces:
                file.write(memoryview(source[:size]))
        return self._move

    def _move(self) -> None:
        (self._folder / "copied").unlink(missing_ok=True)
        shutil.copyfile(self._folder / "raw", self._folder / "copied")

    def __exit__(self, *_: object) -> None:
        """The folder is a temporary one."""


RIVALS = {"distributed": Broadcast, "tensor": SharedCopy, "disk": FileCopy}

if __name__ == "__main__":
    main()
