"""One RL step of a small MoE on one device, whole: generate in process, score with the trainer, update, send weights.

    python benchmarks/bench_rl_step.py [--layers 6] [--record]

The layers are OLMoE's (hidden 2048, 64 experts of 1024, 8 of them a token; arXiv 2409.02060) with random weights, as
many as leave room for Adam beside them; the objective is VESPO against the policy that drew (`behavior: rollout`). What
is said besides the times is of bfloat16 on that device: how far the trainer's log-probs are from the engine's (k3, the
largest of a token), and how often the two send a token to the same experts. On a CPU the widths are a sixteenth.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import devices  # noqa: E402
from benchmarks.results import record  # noqa: E402

VOCABULARY = 50304


def make_model(layers: int, share: int, folder: Path, device: str) -> None:
    """OLMoE's layers as a Qwen3-MoE, weights random, widths over `share`."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY // share,
        hidden_size=2048 // share,
        intermediate_size=4096 // share,
        moe_intermediate_size=1024 // share,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=128 // share,
        num_experts=64,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        mlp_only_layers=[],
        max_position_embeddings=2048,
        dtype=torch.bfloat16,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            Qwen3MoeForCausalLM(config).save_pretrained(folder)
    finally:
        torch.set_default_dtype(before)


def generate(engine, responses: int, prompt: int, length: int, vocabulary: int, version: int):
    """Samples of random prompts, all of one length."""
    from vespo_megatron.data.sample import Sample
    from vespo_megatron.rollout_sglang.engine import GenerationRequest, SamplingParams

    chance = np.random.default_rng(version)
    requests = [
        GenerationRequest(
            f"{version}.{index}",
            tuple(chance.integers(3, vocabulary, prompt).tolist()),
            SamplingParams(length),
            seed=index,
        )
        for index in range(responses)
    ]
    results = asyncio.run(engine.generate(requests))
    return [
        Sample(
            sample_id=request.request_id,
            prompt_id=request.request_id,
            prompt_ids=np.array(request.prompt_ids),
            response_ids=result.output_ids,
            behavior_log_probs=result.behavior_log_probs,
            weight_versions=result.weight_versions,
            finish_reason=result.finish_reason,
            routes=result.routes,
            route_versions=result.route_versions,
        )
        for request, result in zip(requests, results, strict=True)
    ]


def mismatch(policy, batch) -> dict[str, float]:
    """Of the trainer's log-probs and routes against the engine's, at equal weights."""
    from vespo_megatron.megatron.micro_batch import layouts, prepare
    from vespo_megatron.megatron.policy import RouteUse
    from vespo_megatron.routing_replay.table import slice_routes

    parts = [batch]
    tables = [
        slice_routes(
            part.samples,
            layout,
            policy.moe_layers,
            topk=policy.shape.num_experts_per_tok,
            num_experts=policy.shape.num_experts,
        )
        for part, layout in zip(parts, layouts(parts, policy.rank_info), strict=True)
    ]
    batches = prepare(parts, policy.rank_info, temperature=1.0, log_prob_bytes=512 << 20, routes=tables)
    for each in batches:
        each.trainer_routes = policy.empty_routes(each)
    answers = policy.log_probs(batches, routes=RouteUse("record", lambda each: (each.trainer_routes, None)))
    gap = torch.cat(
        [answer[0] - each.behavior_log_probs for answer, each in zip(answers, batches, strict=True)]
    ).double()
    same = total = 0
    for each in batches:
        rows = each.layout.is_real[each.layout.sequence_parallel_slice] & each.engine_routes.recorded
        ours, theirs = np.sort(each.trainer_routes.experts[rows]), np.sort(each.engine_routes.experts[rows])
        same, total = same + int((ours == theirs).all(-1).sum()), total + ours[..., 0].size
    return {
        "k3": float((gap.exp() - 1 - gap).mean()),
        "largest": float(gap.abs().max()),
        "sequences": float(gap.sum() / len(batch.samples)),
        "routes": float((ours == theirs).all(-1).mean()),
    }


def main() -> None:
    """Measure, print, and with --record write to RESULTS.md (a GPU's figures alone)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=devices.default_device())
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="write to benchmarks/RESULTS.md")
    arguments = parser.parse_args()
    if arguments.record and arguments.device != "cuda":
        parser.error("--record: only a GPU's figures are worth keeping")
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        text = measure(arguments.layers, arguments.steps, arguments.device, Path(folder))
    print(text)
    if arguments.record:
        record(f"An RL step of a small MoE on {devices.name(arguments.device)}", text)


def measure(layers: int, steps: int, device: str, folder: Path) -> str:
    """The section's text."""
    from benchmarks.training_step import train_step
    from vespo_megatron.data.batch import Batch
    from vespo_megatron.megatron import parallel
    from vespo_megatron.megatron.policy import MegatronPolicy
    from vespo_megatron.recipe.schema import Recipe
    from vespo_megatron.rollout_sglang.in_process.engine import InProcessEngine
    from vespo_megatron.trainer.objective import Objective

    share, responses, prompt, length = (1, 64, 64, 256) if device == "cuda" else (16, 4, 8, 16)
    make_model(layers, share, folder / "model", device)
    place = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
    recipe = Recipe().with_values(
        {
            "policy.model_name": str(folder / "model"),
            "policy.precision": "bfloat16",
            "policy.megatron_cfg.logprob_memory_mb": 512,
            "policy.sequence_packing.train_mb_tokens": responses * (prompt + length) // 2,
            "policy.train_global_batch_size": responses,
            "loss_fn.behavior": "rollout",
        }
    )
    rank_info = parallel.initialize(
        recipe.policy.megatron_cfg, seed=1, device=place, init_method=f"file://{folder}/store"
    )
    policy = MegatronPolicy(recipe.policy, rank_info, total_updates=1000)
    objective = Objective(recipe.loss_fn, recipe.behavior)
    engine = InProcessEngine(folder / "model", dtype=torch.bfloat16, device=place, context_length=1024)
    phases: dict[str, list[float]] = {"generate": [], "compare": [], "update": [], "send weights": []}
    found: dict[str, float] = {}
    peak = devices.PeakMemory(device)
    for version in range(steps):
        marks = [devices.now(device)]
        samples = generate(engine, responses, prompt, length, policy.shape.vocab_size, version)
        marks.append(devices.now(device))
        batch = Batch(samples, np.random.default_rng(version).normal(size=len(samples)).astype(np.float32))
        found = mismatch(policy, batch)
        marks.append(devices.now(device))
        train_step(batch, recipe, policy, objective)
        marks.append(devices.now(device))
        engine.update_weights(policy.exporter.stream(), version + 1)
        marks.append(devices.now(device))
        for name, seconds in zip(phases, np.diff(marks), strict=True):
            phases[name].append(seconds)
    engine.close()
    parameters = sum(parameter.numel() for chunk in policy.chunks for parameter in chunk.parameters())
    parallel.finalize()
    tokens = responses * length
    rows = [f"| {name} | {min(seconds):.2f} |" for name, seconds in phases.items()]
    return "\n".join(
        [
            f"{layers} of OLMoE's layers, {parameters / 1e9:.2f}B parameters, bfloat16 with float32 Adam; {responses} "
            f"responses of {length} tokens; the shortest of {steps} steps; {peak.extra() / 2**30:.1f} GiB on top of "
            "the weights.",
            "",
            "| phase | seconds |",
            "|---|---|",
            *rows,
            "",
            f"{tokens / min(phases['generate']):,.0f} tokens/s generated, {tokens / min(phases['update']):,.0f} "
            "trained.",
            "",
            f"Engine and trainer at equal weights, in bfloat16: k3 {found['k3']:.2e}, the largest gap of a token "
            f"{found['largest']:.3f}, the mean of a response {found['sequences']:.3f}; {found['routes']:.2%} of "
            "tokens and layers go to the same experts.",
        ]
    )


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"{time.perf_counter() - started:.0f} s")
