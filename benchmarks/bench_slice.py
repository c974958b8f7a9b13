"""MFU of some layers of Qwen3-30B-A3B at their real widths on one GPU, with the native layers: an update of VESPO.

    python benchmarks/bench_slice.py [--layers 4] [--record]

Embedding, output layer and vocabulary are the model's own, the weights random, the micro-batches packed to 16,384
tokens of sequences with a long tail, the step the trainer's own: packing, slicing, forward, backward, optimizer,
metrics. Model FLOPs are counted as in `throughput/mfu`. On a CPU the widths are a sixteenth, so that the script itself
can be tried; what it says there is no MFU.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import devices  # noqa: E402
from benchmarks.results import record  # noqa: E402

PACK_TOKENS = 16384


def make_model(layers: int, share: int, folder: Path) -> None:
    """Qwen3-30B-A3B's config.json with `layers` of its 48 layers and widths over `share`."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=151936 // share,
        hidden_size=2048 // share,
        intermediate_size=6144 // share,
        moe_intermediate_size=768 // share,
        num_hidden_layers=layers,
        num_attention_heads=32 // min(share, 8),
        num_key_value_heads=4,
        head_dim=128 // share,
        num_experts=128 // share,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        mlp_only_layers=[],
        max_position_embeddings=PACK_TOKENS,
        rope_theta=1e6,
        dtype=torch.bfloat16,
    )
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def make_batch(packs: int, tokens: int, vocabulary: int):
    """Responses log-normal in length, prompts of a sixteenth of the pack; about `packs` micro-batches of `tokens`."""
    from vespo_megatron.data.batch import Batch
    from vespo_megatron.data.sample import Sample

    chance, samples, prompt = np.random.default_rng(0), [], tokens // 64
    while sum(sample.num_tokens for sample in samples) < 0.95 * packs * tokens:
        length = int(np.clip(chance.lognormal(np.log(tokens / 8), 0.8), 16, tokens - prompt))
        name = str(len(samples))
        samples.append(
            Sample(
                sample_id=name,
                prompt_id=name,
                prompt_ids=chance.integers(3, vocabulary, prompt),
                response_ids=chance.integers(3, vocabulary, length),
                behavior_log_probs=np.full(length, -np.log(vocabulary)),
                weight_versions=np.zeros(length),
                finish_reason="stop",
            )
        )
    return Batch(samples, chance.normal(size=len(samples)).astype(np.float32))


def measure(layers: int, steps: int, device: str, folder: Path) -> str:
    """The table's line."""
    from benchmarks.training_step import train_step
    from vespo_megatron.megatron import parallel
    from vespo_megatron.megatron.policy import MegatronPolicy
    from vespo_megatron.recipe.schema import Recipe
    from vespo_megatron.trainer.objective import Objective
    from vespo_megatron.trainer.utilization import utilization

    share, tokens = (1, PACK_TOKENS) if device == "cuda" else (16, PACK_TOKENS // 16)
    make_model(layers, share, folder / "model")
    batch = make_batch(packs=4, tokens=tokens, vocabulary=151936 // share)
    recipe = Recipe().with_values(
        {
            "policy.model_name": str(folder / "model"),
            "policy.precision": "bfloat16" if device == "cuda" else "float32",
            "policy.megatron_cfg.logprob_memory_mb": 512 if device == "cuda" else 64,
            "policy.sequence_packing.train_mb_tokens": tokens,
            "policy.train_global_batch_size": len(batch.samples),
        }
    )
    rank_info = parallel.initialize(
        recipe.policy.megatron_cfg, seed=1, device=torch.device(device), init_method=f"file://{folder}/store"
    )
    policy, objective = (
        MegatronPolicy(recipe.policy, rank_info, total_updates=1000),
        Objective(recipe.loss_fn, recipe.behavior),
    )
    took = []
    peak = devices.PeakMemory(device)
    for _ in range(steps + 2):
        started = devices.now(device)
        train_step(batch, recipe, policy, objective)
        took.append(devices.now(device) - started)
    seconds = statistics.median(took[2:])
    found = utilization(batch.samples, policy.shape, seconds=seconds, device=torch.device(device), devices=1)
    parallel.finalize()
    mfu = f"{found['throughput/mfu']:.1%}" if "throughput/mfu" in found else "-"
    num_tokens = sum(sample.num_tokens for sample in batch.samples)
    return (
        f"| {layers} | {2048 // share} | {num_tokens} | {seconds:.3g} | {num_tokens / seconds:,.0f} "
        f"| {found['throughput/tflops_per_device']:.3g} | {mfu} | {peak.extra() / 2**30:.1f} |"
    )


def main() -> None:
    """Measure, print, and with --record write to RESULTS.md (a GPU's figures alone)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=devices.default_device())
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--record", action="store_true", help="write to benchmarks/RESULTS.md")
    arguments = parser.parse_args()
    if arguments.record and arguments.device != "cuda":
        parser.error("--record: only a GPU's figures are worth keeping")
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    with tempfile.TemporaryDirectory() as folder:
        line = measure(arguments.layers, arguments.steps, arguments.device, Path(folder))
    text = "\n".join(
        [
            f"Micro-batches packed to {PACK_TOKENS} tokens, bfloat16, one device, median of {arguments.steps} updates.",
            "",
            "| layers | hidden | tokens an update | seconds | tokens/s | TFLOP/s | MFU | memory on top (GiB) |",
            "|---|---|---|---|---|---|---|---|",
            line,
        ]
    )
    print(text)
    if arguments.record:
        record(f"A slice of Qwen3-30B-A3B on {devices.name(arguments.device)}", text)


if __name__ == "__main__":
    main()
