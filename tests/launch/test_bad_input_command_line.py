"""Bad input through the real command line: one message, status 2, within seconds, and no process left behind.

Everything here is real: checkpoint, tokenizer, data, megatron-core on two processes, SGLang.
"""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path

import pytest
from command_line import ROW, of_this_run, started, write_rows

from vespo_megatron.run.processes import wait_until


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
@pytest.mark.parametrize(
    ("signum", "override", "status"),
    [(signal.SIGINT, "checkpointing.enabled=true", 130), (signal.SIGTERM, "checkpointing.enabled=false", 143)],
)
def test_a_signal_in_the_midst_of_training_stops_everything(folder, signum, override, status):
    metrics = folder / "runs" / "bad" / "version_0" / "metrics.jsonl"
    with started(folder, override) as process:
        assert wait_until(lambda: (metrics.exists() and metrics.stat().st_size) or process.poll() is not None, 150)
        assert process.poll() is None, (folder / "err").read_text()
        assert len(of_this_run(folder)) >= 4  # the launcher, the agent and two workers
        asked = time.monotonic()
        process.send_signal(signum)
        assert process.wait(60) == status
        assert wait_until(lambda: not of_this_run(folder), 10), of_this_run(folder)
        assert time.monotonic() - asked < 60
    assert (folder / "err").read_text().endswith(f"vespo-megatron: stopped by {signum.name}\n")
