"""Make what calculator.yaml needs, offline and from fixed seeds: prompts, and a Qwen3-MoE that seldom calls its tool.

    python examples/tiny_moe/prepare_calculator.py --output examples/tiny_moe/build_calculator

The task is in `long_sums.py`; the tokenizer is `prepare.py`'s, the model of `tiny_models.py`. Running it again changes
nothing; `--force` makes it anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from long_sums import GUESS_SHARE, GUESSES_FROM, WARM_START_STEPS, demonstration, make_rows, prompt_text
from prepare import (
    ASSISTANT,
    END,
    LEARNING_RATE,
    NUM_TRAIN,
    NUM_VALIDATION,
    SEED,
    USER,
    VOCAB_SIZE,
    WARM_START_BATCH,
    build_tokenizer,
)
from tiny_models import tiny_model, use_published_names

FAMILY = "qwen3_moe"

IGNORED = -100


def write_data(folder: Path) -> set[tuple[int, ...]]:
    """Write both splits; returns the validation digits, which the warm start must not see."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(SEED)
    taken: set[tuple[int, ...]] = set()
    validation = make_rows(NUM_VALIDATION, "validation", generator, taken)
    held_out = set(taken)
    for name, rows in (("validation", validation), ("train", make_rows(NUM_TRAIN, "train", generator, taken))):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    return held_out


def encoded(tokenizer: Any, digits: list[int], messages: list[str]) -> tuple[list[int], list[int]]:
    """Token ids of one demonstration, and its labels: `IGNORED` but for what the assistant says."""
    ids: list[int] = []
    labels: list[int] = []
    for number, text in enumerate([prompt_text(digits), *messages]):
        if number % 2:
            part = tokenizer.backend_tokenizer.encode(text + END).ids
            labels += part
        else:
            part = tokenizer.backend_tokenizer.encode(USER + text + ASSISTANT).ids
            labels += [IGNORED] * len(part)
        ids += part
    return ids, labels


def demonstration_batch(tokenizer: Any, generator: Any, guess_share: float, held_out: set) -> tuple[Any, Any]:
    """Right-padded `input_ids` and `labels`, both int64 [batch, longest]."""
    import torch

    rows: list[tuple[list[int], list[int]]] = []
    while len(rows) < WARM_START_BATCH:
        digits, messages = demonstration(generator, guess_share)
        if tuple(digits) not in held_out:
            rows.append(encoded(tokenizer, digits, messages))
    longest = max(len(ids) for ids, _ in rows)
    input_ids = torch.tensor([ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids, _ in rows])
    return input_ids, torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in rows])


def warm_start(tokenizer: Any, held_out: set, steps: int) -> Any:
    """A tiny model trained on demonstrations: first on calls alone, then mostly on guesses."""
    import numpy as np
    import torch

    model = tiny_model(FAMILY, tokenizer, VOCAB_SIZE, SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    generator = np.random.default_rng([SEED, 1])
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 20, 2.0 * (steps - step) / steps)
        guess_share = GUESS_SHARE if step >= GUESSES_FROM * steps else 0.0
        input_ids, labels = demonstration_batch(tokenizer, generator, guess_share, held_out)
        logits = model(input_ids=input_ids).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 49:
            print(f"warm start {step + 1}/{steps}: loss {loss.item():.3f}")
    return model.eval()


def fingerprint() -> str:
    """Identifies what this file would make: a digest of its own text, its task's and those it is made with."""
    names = ("prepare_calculator.py", "long_sums.py", "prepare.py", "tiny_models.py")
    return hashlib.sha256(b"".join(Path(__file__).with_name(name).read_bytes() for name in names)).hexdigest()


def prepare(output: Path, *, force: bool = False, steps: int = WARM_START_STEPS) -> dict[str, Any]:
    """Make `output` unless it is already what this file would make; returns the content of `prepared.json`."""
    stamp = output / "prepared.json"
    if not force and stamp.exists():
        made = json.loads(stamp.read_text())
        if (made["fingerprint"], made["steps"]) == (fingerprint(), steps):
            print(f"{output} is already prepared")
            return made
    import torch

    started = time.monotonic()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(2, len(os.sched_getaffinity(0))))
    for part in ("model", "data"):
        shutil.rmtree(output / part, ignore_errors=True)
    stamp.unlink(missing_ok=True)
    held_out = write_data(output / "data")
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(output / "model")
    warm_start(tokenizer, held_out, steps).save_pretrained(output / "model")
    use_published_names(output / "model" / "config.json", FAMILY)
    made = {"fingerprint": fingerprint(), "steps": steps, "seconds": round(time.monotonic() - started, 1)}
    stamp.write_text(json.dumps(made, indent=2) + "\n")
    print(f"{output}: {made['seconds']} s")
    return made


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "build_calculator", help="folder to write"
    )
    parser.add_argument("--force", action="store_true", help="make it again although it is there")
    parser.add_argument("--steps", type=int, default=WARM_START_STEPS, help="updates of the warm start")
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    prepare(options.output, force=options.force, steps=options.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
