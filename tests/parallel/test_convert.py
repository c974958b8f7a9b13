"""`vespo-megatron convert`: there in one process, back in another layout of two, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

pytestmark = [pytest.mark.parallel, pytest.mark.timeout(240)]


def convert(*arguments, processes=1):
    program = [sys.executable, "-m"]
    if processes > 1:
        program += [
            "torch.distributed.run",
            f"--nproc-per-node={processes}",
            "--rdzv-backend=c10d",
            "--rdzv-endpoint=127.0.0.1:0",
            "--local-addr=127.0.0.1",
            "-m",
        ]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*program, "vespo_megatron.cli", "convert", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_there_and_back_in_another_layout_is_bit_equal(checkpoint, tmp_path):
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    there = convert(checkpoint[0], megatron)
    assert there.returncode == 0, there.stderr
    assert there.stdout.startswith(f"{megatron}: distributed checkpoint, checksum ")
    layout = ["tensor_model_parallel_size=2", "sequence_parallel=true", "expert_model_parallel_size=2"]
    again = convert(megatron, back, "--model", checkpoint[0], "--layout", *layout, processes=2)
    assert again.returncode == 0, again.stderr
    assert again.stdout.split("checksum ")[1] == there.stdout.split("checksum ")[1]
    original = load_file(f"{checkpoint[0]}/model.safetensors")
    found = load_file(back / "model-00001.safetensors")
    assert found.keys() == original.keys()
    assert all((found[name] == tensor).all() for name, tensor in original.items())
    refused = convert(megatron, back, "--model", checkpoint[0])
    assert (
        refused.returncode == 2
        and refused.stderr == f"vespo-megatron: {back}: exists\n  to do: name a folder that does not\n"
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere", "out"], "nowhere: is no checkpoint"),
        (["made", "out"], "made: does not say which model it is of"),
    ],
)
def test_what_cannot_be_converted_is_said(arguments, says, tmp_path, monkeypatch, capsys):
    from vespo_megatron.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "metadata.json").write_text("{}")
    assert main(["convert", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_a_correction_bias_goes_there_and_back_in_float32(tmp_path):
    """GLM-4.5 in bfloat16: everything else is rounded, and the folder says so."""
    import torch
    from family_checkpoints import make_family

    model, megatron, back = tmp_path / "model", tmp_path / "megatron", tmp_path / "back"
    made = make_family(model, "glm4_moe")
    made.bfloat16().save_pretrained(model)
    bias = load_file(model / "model.safetensors")["model.layers.2.mlp.gate.e_score_correction_bias"]
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.mlp.gate.e_score_correction_bias"] = bias = bias.float() + 1e-4
    from safetensors.torch import save_file

    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert (done := convert(model, megatron)).returncode == 0, done.stderr
    assert (done := convert(megatron, back, "--model", model)).returncode == 0, done.stderr
    found = load_file(back / "model-00001.safetensors")
    assert torch.equal(found["model.layers.2.mlp.gate.e_score_correction_bias"], bias)
    assert found["model.norm.weight"].dtype is torch.bfloat16
    assert '"bfloat16"' in (back / "config.json").read_text()
