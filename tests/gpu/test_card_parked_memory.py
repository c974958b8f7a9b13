"""On a GPU: memory that the policy gives back is the device's again, and what was in it comes back to the last bit."""

from __future__ import annotations

import multiprocessing
import os
from typing import Any

import numpy as np
import pytest

VOCAB, MIB = 32_000, 1 << 20


def write_model(folder: str) -> None:
    """About 90 M parameters: what an allocator holds for itself is little beside them."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=1024,
        moe_intermediate_size=256,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).save_pretrained(folder)


def loss(log_probs, entropies, micro_batch):
    return -log_probs.sum() / 1000, None


def measure(folder: str, store: str, precision: str, queue: Any) -> None:
    """Bytes that PyTorch has allocated and reserved, here and away, and whether everything came back; in a process."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    import torch

    from vespo_megatron.data.batch import Batch
    from vespo_megatron.data.sample import Sample
    from vespo_megatron.megatron import parallel
    from vespo_megatron.megatron.micro_batch import prepare
    from vespo_megatron.megatron.parked_memory import PARTS
    from vespo_megatron.megatron.policy import MegatronPolicy
    from vespo_megatron.recipe.schema import PolicyConfig

    config = PolicyConfig(model_name=folder, precision=precision).with_values({"megatron_cfg.layer_spec": "native"})
    device = torch.device("cuda", 0)
    rank_info = parallel.initialize(config.megatron_cfg, seed=1, device=device, init_method=store)
    policy = MegatronPolicy(config, rank_info, total_updates=4)
    generator = np.random.default_rng(0)
    samples = [
        Sample(
            sample_id=f"s{index}",
            prompt_id=f"p{index}",
            prompt_ids=generator.integers(0, VOCAB, 4),
            response_ids=generator.integers(0, VOCAB, 60),
            behavior_log_probs=np.full(60, -5.0),
            weight_versions=np.zeros(60),
            finish_reason="stop",
        )
        for index in range(4)
    ]
    batch = Batch(samples, np.ones(4, dtype=np.float32))
    micro_batches = prepare([batch], rank_info, temperature=1.0, log_prob_bytes=16 * MIB)

    def state() -> list[torch.Tensor]:
        tensors = policy.weights()
        for part in policy.optimizer.chained_optimizers:
            for main, moments in part.optimizer.state.items():
                tensors += [main.detach(), *(value for value in moments.values() if torch.is_tensor(value))]
        return tensors

    policy.update(micro_batches, loss)
    answers: dict[str, Any] = {"needed": sum(policy.memory.nbytes(part) for part in PARTS)}
    for number in range(2):  # the second time host memory is there already
        before = [tensor.cpu() for tensor in state()]
        torch.cuda.synchronize()
        answers["here"] = torch.cuda.memory_allocated()
        policy.memory.park("gradients", "optimizer")
        policy.memory.park("parameters")
        answers["away"], answers["reserved"] = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        policy.memory.restore()
        answers["after"] = torch.cuda.memory_allocated()
        pairs = zip(before, state(), strict=True)
        answers[f"equal {number}"] = all(torch.equal(each, here.cpu()) for each, here in pairs)
        policy.update(micro_batches, loss)
    queue.put(answers)
    parallel.finalize()


@pytest.mark.cuda
@pytest.mark.timeout(300)
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_the_device_has_the_memory_until_it_is_taken_back(precision, tmp_path, note):
    write_model(str(tmp_path / "model"))
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(
        target=measure, args=(str(tmp_path / "model"), f"file://{tmp_path}/store", precision, queue), daemon=True
    )
    process.start()
    found = queue.get(timeout=240)
    process.join(30)
    note(**found)
    assert found["equal 0"] and found["equal 1"]
    assert found["needed"] > 1000 * MIB
    assert found["away"] < 0.1 * found["here"], "near zero: workspaces and the batch are left"
    assert found["reserved"] < 0.15 * found["here"]
    assert abs(found["after"] - found["here"]) < 0.05 * found["here"]
