"""A whole run with rounded weights in its rollouts: from the first rollout on, told of, and in no checkpoint."""

from __future__ import annotations

import pytest
from command_line import started
from safetensors.torch import load_file

from vespo_megatron.quantization import fake_quantize
from vespo_megatron.run.metrics_file import read_metrics


@pytest.mark.timeout(240)
def test_rollouts_are_of_rounded_weights_from_the_first_and_what_is_saved_is_not(folder):
    overrides = ("policy.generation.mismatch.weights=int3", "policy.generation.mismatch.group_size=32")
    overrides += ("grpo.max_num_steps=2", "checkpointing.save_hf=true", "exp_manager.version=main")
    with started(folder, *overrides) as process:
        assert process.wait(180) == 0, (folder / "err").read_text()
    run_dir = folder / "runs" / "bad" / "main"
    assert "mismatch: weights int3 (groups of 32)\n" in (folder / "err").read_text()
    assert "weights int3 (groups of 32)" in (run_dir / "report.html").read_text()
    first = next(row for row in read_metrics(run_dir) if row["step"] == 1)
    assert first["mismatch/k3"] > 0.1 and first["routes/agreement"] < 0.9
    name = "model.layers.1.self_attn.q_proj.weight"
    kept = {}
    for file in (run_dir / "checkpoints" / "final_hf").glob("*.safetensors"):
        kept |= load_file(file)
    start = load_file(folder / "model" / "model.safetensors")
    assert (kept[name] - start[name]).abs().max() < 1e-4
    assert (fake_quantize(kept[name], "int3", 32) - kept[name]).abs().max() > 0.01
