"""How long a large set takes until its first prompt: the first time, the next time, and the memory that it holds.

    python benchmarks/bench_data.py [--rows 1000000] [--record]

Rows are chats under Qwen3's form of template, tokenised by a byte tokenizer of transformers' kind. The
rival is the tokenizer alone: `apply_chat_template` on the same messages, in batches, one process. Each start is a
process of its own with a cache of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks.results import record  # noqa: E402

START = """
import json, sys, time
from pathlib import Path
from vespo_megatron.data.template import load_tokenizer
from vespo_megatron.launch.prompts import load_run_prompts
from vespo_megatron.recipe.schema import Recipe
import datasets, torch, transformers
def resident():
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("RssAnon"))
    return int(line.split()[1]) / 1024
recipe = Recipe().with_values({"policy.model_name": sys.argv[1], "data.train.path": sys.argv[2], "env.reward": "math"})
tokenizer = load_tokenizer(recipe)
before, imported = resident(), time.perf_counter()
prompts = load_run_prompts(recipe, tokenizer)
taken = prompts.train.take(512)
print(json.dumps({"seconds": time.perf_counter() - imported, "memory": resident() - before, "count": prompts.count}))
"""
TOKENIZER = """
import json, sys, time
from vespo_megatron.data.template import load_tokenizer
from vespo_megatron.recipe.schema import Recipe
import datasets
tokenizer = load_tokenizer(Recipe().with_values({"policy.model_name": sys.argv[1]}))
rows = datasets.load_dataset("parquet", data_files=sys.argv[2], split="train")
began = time.perf_counter()
for batch in rows.select_columns(["prompt"]).iter(1000):
    tokenizer.apply_chat_template(batch["prompt"], add_generation_prompt=True, tokenize=True, return_dict=False)
print(json.dumps({"seconds": time.perf_counter() - began}))
"""


def make_set(rows: int, folder: Path) -> Path:
    """Chats with a number in each, as parquet."""
    import datasets

    text = "A train leaves at {0} and another at {1}: when do they meet?"
    made = datasets.Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": text.format(n, n * 7 % 1009)}] for n in range(rows)],
            "data_source": ["trains"] * rows,
            "reward_model": [{"style": "rule", "ground_truth": str(n)} for n in range(rows)],
        }
    )
    made.to_parquet(folder / f"rows_{rows}.parquet")
    return folder / f"rows_{rows}.parquet"


def make_model(folder: Path) -> Path:
    """A folder with a config.json and a tokenizer."""
    from byte_tokenizer import byte_tokenizer, template
    from model_config import write_config

    folder.mkdir()
    write_config(folder, vocab_size=512, max_position_embeddings=256)
    byte_tokenizer(template("qwen3")).save_pretrained(folder)
    return folder


def start(code: str, model: Path, rows: Path, cache: Path) -> dict[str, float]:
    """One process, and what it says."""
    environment = os.environ | {
        "HF_DATASETS_CACHE": str(cache),
        "PYTHONPATH": str(ROOT),
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, str(model), str(rows)], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure, print, and with --record write to RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 1_000_000])
    parser.add_argument("--record", action="store_true", help="write to benchmarks/RESULTS.md")
    arguments = parser.parse_args()
    lines = [
        "| rows | tokenizer alone (s) | first start (s) | first / tokenizer | next start (s) | memory (MB) |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder / "model")
        for rows in arguments.rows:
            file, cache = make_set(rows, folder), folder / f"cache_{rows}"
            alone = start(TOKENIZER, model, file, cache)
            first, again = (start(START, model, file, cache) for _ in range(2))
            lines.append(
                f"| {rows:,} | {alone['seconds']:.1f} | {first['seconds']:.1f} | "
                f"{first['seconds'] / alone['seconds']:.2f} | {again['seconds']:.1f} | {again['memory']:.0f} |"
            )
            print(lines[-1], flush=True)
    text = "\n".join(["Anonymous memory that loading adds, two processes that tokenise.", "", *lines])
    print(text)
    if arguments.record:
        record("A large set until its first prompt", text)


if __name__ == "__main__":
    main()
