"""Make everything the tiny example needs, offline and from fixed seeds: tokenizer, prompts, warm-started model.

    python examples/tiny_moe/prepare.py --output examples/tiny_moe/build

The task, and what the warm start leaves to reinforcement learning, is in `running_sums.py`. Written under `--output`:
`model/` (Hugging Face folder: config, safetensors, tokenizer) and `data/{train,validation}.parquet` in veRL's schema.
Running it again changes nothing; `--force` makes it anew. `--task long` makes rows of up to 36 digits, for responses of
up to 40 tokens: the studies'. `--family` makes a model of another family of `tiny_models.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from running_sums import BOX, INSTRUCTION, POLITE, TASKS, Task, boxed, demonstration, make_rows, prompt_text
from tiny_models import COMMON, FAMILIES, PATIENCE, tiny_model, use_published_names

NUM_TRAIN = 4096
NUM_VALIDATION = 256
WARM_START_BATCH = 64
LEARNING_RATE = 3e-3
SEED = 2602

PAD, UNKNOWN, END, USER, ASSISTANT = "<|pad|>", "<|unk|>", "<|end|>", "<|user|>", "<|assistant|>"
VOCAB_SIZE = 128
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|>' + message['content'] + '<|end|>' }}"
    "{% else %}{{ '<|user|>' + message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer() -> Any:
    """A `PreTrainedTokenizerFast` that decodes to exactly the text it encoded, for any printable ASCII text.

    One token per character, except the special tokens, the two fixed phrases of a prompt, `\\boxed{`, and a space
    with the digit or dash behind it.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [PAD, UNKNOWN, END, USER, ASSISTANT, INSTRUCTION, POLITE, BOX]
    pieces += [f" {digit}" for digit in range(10)] + [" -"] + ["\n"] + [chr(code) for code in range(32, 127)]
    tokenizer = Tokenizer(models.WordLevel({piece: number for number, piece in enumerate(pieces)}, unk_token=UNKNOWN))
    pattern = rf"{INSTRUCTION}|Please\. |\\boxed\{{| [0-9-]|[\s\S]"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in pieces[:5]])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=COMMON["max_position_embeddings"],
    )


def write_data(folder: Path, task: Task) -> set[tuple[int, ...]]:
    """Write both splits; returns the validation digits, which the warm start must not see."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(SEED)
    taken: set[tuple[int, ...]] = set()
    validation = make_rows(NUM_VALIDATION, "validation", generator, taken, task)
    held_out = set(taken)
    train = make_rows(NUM_TRAIN, "train", generator, taken, task)
    for name, rows in (("train", train), ("validation", validation)):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    return held_out


def demonstration_batch(
    tokenizer: Any, generator: Any, size: int, guess_share: float, held_out: set[tuple[int, ...]], task: Task
) -> tuple[Any, Any]:
    """Right-padded `input_ids` and `labels`, both int64 [size, longest]; labels are -100 outside the response."""
    import torch

    sequences: list[tuple[list[int], int]] = []
    while len(sequences) < size:
        digits, response = demonstration(generator, task, guess_share)
        if tuple(digits) in held_out:
            continue
        messages = [{"role": "user", "content": prompt_text(digits, bool(generator.integers(2)), task.columns)}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        encoded = tokenizer.backend_tokenizer.encode_batch([prompt, response + END])
        sequences.append((encoded[0].ids + encoded[1].ids, len(encoded[0].ids)))
    longest = max(len(ids) for ids, _ in sequences)
    input_ids = torch.full((size, longest), tokenizer.pad_token_id)
    labels = torch.full((size, longest), -100)
    for row, (ids, num_prompt) in enumerate(sequences):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        labels[row, num_prompt : len(ids)] = torch.tensor(ids[num_prompt:])
    return input_ids, labels


def warm_start(tokenizer: Any, held_out: set, task: Task, family: str, *, seed: int = SEED) -> Any:
    """A tiny model trained on demonstrations: first on those that reckon, then mostly on guesses."""
    import numpy as np
    import torch
    from tqdm import tqdm

    steps = task.warm_start_steps
    model = tiny_model(family, tokenizer, VOCAB_SIZE, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    generator = np.random.default_rng([seed, 1])
    progress = tqdm(range(steps), desc="warm start", unit="step", mininterval=1.0)
    for step in progress:
        rate = LEARNING_RATE * min(1.0, (step + 1) / 20, 2.0 * (steps - step) / steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        guess_share = task.guess_share if step >= task.guesses_from * steps else 0.0
        input_ids, labels = demonstration_batch(tokenizer, generator, WARM_START_BATCH, guess_share, held_out, task)
        logits = model(input_ids=input_ids).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 9:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def accuracy(
    model: Any, tokenizer: Any, rows: list[dict[str, Any]], max_new_tokens: int, *, greedy: bool, seed: int = 0
) -> float:
    """Share of one response per row, greedy or sampled at temperature 1, whose boxed digit is the ground truth."""
    import torch

    texts = [tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True) for row in rows]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
    sampling = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    torch.manual_seed(seed)
    with torch.no_grad():
        output = model.generate(**inputs, **sampling, max_new_tokens=max_new_tokens)
    replies = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    answers = [boxed(row["reward_model"]["ground_truth"]) for row in rows]
    return sum(answer in reply for answer, reply in zip(answers, replies, strict=True)) / len(rows)


def fingerprint() -> str:
    """Identifies what this file would make: a digest of its own text and its task's."""
    sources = [Path(__file__).with_name(name) for name in ("prepare.py", "running_sums.py", "tiny_models.py")]
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


def prepare(
    output: Path, *, force: bool = False, task: Task = TASKS["short"], family: str = "qwen3_moe"
) -> dict[str, Any]:
    """Make `output` unless it is already what this file would make; returns the content of `prepared.json`."""
    stamp = output / "prepared.json"
    task = replace(task, warm_start_steps=round(task.warm_start_steps * PATIENCE.get(family, 1)))
    if not force and stamp.exists():
        made = json.loads(stamp.read_text())
        if (made["fingerprint"], made["task"], made.get("family")) == (fingerprint(), asdict(task), family):
            print(f"{output} is already prepared (accuracy at the start {_shown(made)})")
            return made
    import pyarrow.parquet as pq
    import torch

    started = time.monotonic()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(2, len(os.sched_getaffinity(0))))
    for part in ("model", "data"):
        shutil.rmtree(output / part, ignore_errors=True)
    stamp.unlink(missing_ok=True)
    held_out = write_data(output / "data", task)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(output / "model")
    model = warm_start(tokenizer, held_out, task, family)
    model.save_pretrained(output / "model")
    use_published_names(output / "model" / "config.json", family)
    rows = pq.read_table(output / "data" / "validation.parquet").to_pylist()
    made = {
        "fingerprint": fingerprint(),
        "task": asdict(task),
        "family": family,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "greedy": accuracy(model, tokenizer, rows, task.columns + 8, greedy=True),
        "accuracy": accuracy(model, tokenizer, rows, task.columns + 8, greedy=False),
        "seconds": round(time.monotonic() - started, 1),
    }
    stamp.write_text(json.dumps(made, indent=2) + "\n")
    print(f"{output}: {made['parameters']:,} parameters, held-out accuracy {_shown(made)}, {made['seconds']} s")
    return made


def _shown(made: dict[str, Any]) -> str:
    return f"{made['greedy']:.3f} greedily, {made['accuracy']:.3f} sampled at temperature 1"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "build", help="folder to write")
    parser.add_argument("--force", action="store_true", help="make it again although it is there")
    parser.add_argument("--task", choices=list(TASKS), default="short", help="short: up to 14 digits; long: up to 36")
    parser.add_argument("--family", choices=list(FAMILIES), default="qwen3_moe", help="model_type of the model")
    parser.add_argument("--steps", type=int, help="updates of the warm start")
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    task = TASKS[options.task]
    prepare(
        options.output,
        force=options.force,
        task=task if options.steps is None else replace(task, warm_start_steps=options.steps),
        family=options.family,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
