"""Bad input through the real command line: one message, status 2, within seconds, and no process left behind.

Everything here is real: checkpoint, tokenizer, data, torchrun, megatron-core on two processes, SGLang.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from vespo_megatron.trainer.process import wait_until

ROW = {"prompt": "1 + 1 =", "data_source": "sums", "reward_model": {"ground_truth": "2"}}
REWARDS = "def boom(data_source, solution_str, ground_truth, extra_info):\n    raise ValueError('no such unit')\n"


@pytest.fixture
def folder(tmp_path, tiny_qwen3_moe_folder) -> Path:
    """A folder with everything a run of two processes needs, and all of it right."""
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
    (tmp_path / "rewards_of_mine.py").write_text(REWARDS)
    write_rows(tmp_path, [ROW] * 4)
    recipe = {
        "grpo": {
            "num_prompts_per_step": 4, "num_generations_per_prompt": 2, "max_num_steps": 100_000, "val_period": 0,
        },
        "policy": {
            "model_name": str(model),
            "train_global_batch_size": 8,
            "max_total_sequence_length": 32,
            "precision": "float32",
            "megatron_cfg": {
                "tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_model_parallel_size": 2,
                "layer_spec": "native",
            },
            "generation": {"backend": "in_process", "max_new_tokens": 8},
        },
        "data": {"train": {"path": str(tmp_path / "train.jsonl")}, "max_input_seq_length": 16},
        "env": {"reward": "exact_match"},
        "cluster": {"gpus_per_node": 2, "device": "cpu"},
        "exp_manager": {"exp_dir": str(tmp_path / "runs"), "name": "bad"},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    return tmp_path


def write_rows(folder: Path, rows: list[dict]) -> None:
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@contextlib.contextmanager
def started(folder: Path, *overrides: str):
    """`vespo-megatron train` in a session of its own; whatever is left of it in the end is killed."""
    with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "vespo_megatron.cli", "train", str(folder / "recipe.yaml"), *overrides],
            stdout=out, stderr=err, env=os.environ | {"PYTHONPATH": str(folder)}, start_new_session=True,
        )  # fmt: skip
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


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def refused(folder: Path, *overrides: str, timeout: float = 120) -> str:
    """What the run said when it ended with status 2, everything it had started gone."""
    with started(folder, *overrides) as process:
        assert process.wait(timeout) == 2, (folder / "err").read_text()
        assert wait_until(lambda: not of_this_run(folder), 10), of_this_run(folder)
    errors = (folder / "err").read_text()
    assert errors.count("vespo-megatron: ") == 1 and "Traceback" not in errors, errors
    return errors[errors.index("vespo-megatron: ") :]


def nothing(folder: Path) -> None:
    """Every file is right."""


BEFORE_ANY_PROCESS = {
    "a recipe with a typo": (
        nothing,
        ["policy.megatron_cfg.tensor_model_paralel_size=2"],
        [
            "unknown key policy.megatron_cfg.tensor_model_paralel_size",
            "write policy.megatron_cfg.tensor_model_parallel_size",
        ],
    ),
    "an impossible layout": (
        nothing,
        ["policy.megatron_cfg.expert_model_parallel_size=3"],
        ["EP 3", "use 3 processes"],
    ),
    "a missing dataset column": (
        lambda folder: write_rows(folder, [{"prompt": "1", "data_source": "sums"}] * 4),
        [],
        ["train.jsonl: has no column 'reward_model'"],
    ),
    "an empty dataset": (lambda folder: write_rows(folder, []), [], ["train.jsonl: has no rows"]),
    "a prompt longer than the context": (
        lambda folder: write_rows(folder, [ROW] * 4 + [ROW | {"prompt": "1 " * 40}]),
        [],
        ["train.jsonl, row 4: the prompt has 40 tokens", "at most 16"],
    ),
    "a token id out of the vocabulary": (
        lambda folder: write_rows(folder, [ROW] * 4 + [ROW | {"prompt": "1 beyond"}]),
        [],
        ["train.jsonl, row 4: the prompt has token id 128", "below the model's 128"],
    ),
    "a checkpoint with a truncated shard": (
        lambda folder: truncate(folder / "model" / "model.safetensors"),
        [],
        ["model.safetensors: is truncated"],
    ),
}


@pytest.mark.parametrize("name", BEFORE_ANY_PROCESS)
def test_what_is_wrong_with_the_input_is_said_before_any_process_starts(folder, name):
    spoil, overrides, says = BEFORE_ANY_PROCESS[name]
    spoil(folder)
    message = refused(folder, *overrides)
    assert all(part in message for part in says), message
    assert not (folder / "runs").exists()


def test_a_port_in_use_is_named_before_anything_starts(folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        overrides = ["policy.generation.backend=sglang", f"policy.generation.sglang_cfg.port={port}"]
        assert f"port {port} of 127.0.0.1 is in use" in refused(folder, *overrides)
    assert not (folder / "runs").exists()


@pytest.mark.sglang
def test_an_sglang_server_that_dies_at_start_ends_the_run_with_its_reason(folder):
    overrides = [
        "policy.generation.backend=sglang",
        "policy.generation.sglang_cfg.server_args={attention_backend: none}",
    ]
    message = refused(folder, *overrides, timeout=300)
    assert "SGLang died while starting" in message and "argument --attention-backend: invalid choice: 'none'" in message
    assert "usage:" not in message and "server_0.log" in message


@pytest.mark.parallel
def test_a_fault_on_rank_0_in_the_midst_of_a_run_ends_the_other_rank_too(folder):
    message = refused(folder, "env.reward=rewards_of_mine:boom")
    assert message.startswith("vespo-megatron: env.reward: rewards_of_mine:boom raised on each of 8 responses")
    assert "ValueError: no such unit" in message


@pytest.mark.parallel
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_midst_of_training_stops_everything(folder, signum, status):
    metrics = folder / "runs" / "bad" / "version_0" / "metrics.jsonl"
    with started(folder) as process:
        assert wait_until(lambda: metrics.exists() and metrics.stat().st_size or process.poll() is not None, 150)
        assert process.poll() is None, (folder / "err").read_text()
        assert len(of_this_run(folder)) >= 4  # the launcher, torchrun and two workers
        asked = time.monotonic()
        process.send_signal(signum)
        assert process.wait(60) == status
        assert wait_until(lambda: not of_this_run(folder), 10), of_this_run(folder)
        assert time.monotonic() - asked < 60
    assert (folder / "err").read_text().endswith(f"vespo-megatron: stopped by {signum.name}\n")
