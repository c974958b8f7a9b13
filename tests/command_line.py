"""`vespo-megatron train` on a folder with everything a run of two processes needs; all of it real."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil

ROW = {"prompt": "1 + 1 =", "data_source": "sums", "reward_model": {"ground_truth": "2"}}
REWARDS = "def boom(data_source, solution_str, ground_truth, extra_info):\n    raise ValueError('no such unit')\n"
SPREAD = "def spread(data_source, solution_str, ground_truth, extra_info):\n    return float(len(solution_str) % 5)\n"


def make_folder(tmp_path: Path, tiny_qwen3_moe_folder: Path) -> Path:
    """Model, tokenizer, data, rewards and recipe, and all of it right."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = tmp_path / "model"
    shutil.copytree(tiny_qwen3_moe_folder, model)
    words = ["<pad>", "<end>", "<unk>", "+", "=", *map(str, range(10))]
    vocabulary = {word: number for number, word in enumerate(words)} | {"beyond": 128}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    ).save_pretrained(model)
    (tmp_path / "rewards_of_mine.py").write_text(REWARDS + SPREAD)
    write_rows(tmp_path, [ROW] * 4)
    recipe = {
        "grpo": {
            "num_prompts_per_step": 4,
            "num_generations_per_prompt": 2,
            "max_num_steps": 100_000,
            "val_period": 0,
        },
        "policy": {
            "model_name": str(model),
            "train_global_batch_size": 8,
            "max_total_sequence_length": 32,
            "precision": "float32",
            "megatron_cfg": {
                "tensor_model_parallel_size": 2,
                "sequence_parallel": True,
                "expert_model_parallel_size": 2,
                "layer_spec": "native",
            },
            "generation": {"backend": "in_process", "max_new_tokens": 8},
        },
        "data": {"train": {"path": str(tmp_path / "train.jsonl")}, "max_input_seq_length": 16},
        "env": {"reward": "exact_match"},
        "cluster": {"gpus_per_node": 2, "device": "cpu"},
        "exp_manager": {"exp_dir": str(tmp_path / "runs"), "name": "bad"},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    return tmp_path


def write_rows(folder: Path, rows: list[dict]) -> None:
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@contextlib.contextmanager
def started(folder: Path, *overrides: str, program: tuple[str, ...] = ("-m", "vespo_megatron.cli")):
    """`vespo-megatron train` in a session of its own; whatever is left of it in the end is killed."""
    with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, *program, "train", str(folder / "recipe.yaml"), *overrides],
            stdout=out,
            stderr=err,
            env=os.environ | {"PYTHONPATH": str(folder)},
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)
        for left in of_this_run(folder):
            left.kill()


def of_this_run(folder: Path) -> list[psutil.Process]:
    """Processes whose command line or environment names the folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            named = str(folder) in " ".join(process.cmdline()) or process.environ().get("PYTHONPATH") == str(folder)
            if named and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
