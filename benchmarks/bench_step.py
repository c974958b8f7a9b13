"""A training step against TRL's `GRPOTrainer(loss_type="vespo")`: one process, same model, samples and updates.

    pip install --no-deps "trl==1.16.*" accelerate datasets
    python benchmarks/bench_step.py --size tiny medium [--record]

Each side runs in a process of its own, the two in turn. *Training part*: both are given the same samples (TRL through
its `rollout_func`) and make one update per step of all of them; TRL pads each of its micro-batches, ours packs into
as many tokens. *End to end*: both generate as well, TRL with transformers' `generate`, ours with the in-process
engine, every response as long as the longest allowed. Float32, Adam, no activation recomputation, no KL, clipped
gradients; OpenMP set as `vespo-megatron train` sets it (TRL is as fast with its defaults). The first step is not
counted. Memory is the peak resident size of the process, the model's states included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from vespo_megatron.recipe.schema import Recipe  # noqa: E402
from vespo_megatron.run.host_threads import trainer_environment  # noqa: E402

GROUP = 8


@dataclass(frozen=True)
class Size:
    """A model, and the samples of a step."""

    model: dict
    responses: int
    micro_batch: int
    """TRL's sequences per micro-batch."""
    micro_batch_tokens: int
    """Ours."""
    prompt: int
    median: float
    """Of the log-normal response lengths."""
    longest: int
    generated: int
    """Response tokens in the end-to-end part."""


_COMMON = dict(norm_topk_prob=True, tie_word_embeddings=False, max_position_embeddings=1024, mlp_only_layers=[])
SIZES = {
    "tiny": Size(
        dict(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=96,
            moe_intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            num_experts=8,
            num_experts_per_tok=2,
        ),
        responses=32,
        micro_batch=32,
        micro_batch_tokens=4096,
        prompt=10,
        median=10,
        longest=24,
        generated=24,
    ),
    "medium": Size(
        dict(
            vocab_size=32768,
            hidden_size=512,
            intermediate_size=1024,
            moe_intermediate_size=256,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=64,
            num_experts=32,
            num_experts_per_tok=4,
        ),
        responses=32,
        micro_batch=8,
        micro_batch_tokens=2048,
        prompt=32,
        median=100,
        longest=512,
        generated=64,
    ),
}


def make_model(size: Size, folder: Path) -> None:
    """A random model and a word-level tokenizer whose word `t7` is token 7."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    vocabulary = size.model["vocab_size"]
    config = Qwen3MoeConfig(**_COMMON, **size.model, bos_token_id=None, eos_token_id=1, pad_token_id=0)
    Qwen3MoeForCausalLM(config).float().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"t{number}": number for number in range(vocabulary)}, unk_token="t2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t1").save_pretrained(folder)


def samples(size: Size, step: int) -> dict[str, list]:
    """prompts, responses (token ids), and a reward for each response, of one step."""
    random = np.random.default_rng(step)
    prompts = [
        random.integers(3, size.model["vocab_size"], size.prompt).tolist() for _ in range(size.responses // GROUP)
    ]
    lengths = np.clip(random.lognormal(np.log(size.median), 0.8, size.responses), 1, size.longest).astype(int)
    responses = [random.integers(3, size.model["vocab_size"], length).tolist() for length in lengths]
    return {
        "prompts": [prompts[index // GROUP] for index in range(size.responses)],
        "responses": responses,
        "rewards": random.random(size.responses).tolist(),
    }


def peak_bytes() -> int:
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def run_trl(size: Size, folder: Path, steps: int, generate: bool) -> dict:
    """TRL's trainer; seconds of every step."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from transformers import AutoTokenizer, Qwen3MoeForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    model = Qwen3MoeForCausalLM.from_pretrained(folder, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    given = [samples(size, step) for step in range(steps + 1)]
    texts = [" ".join(f"t{token}" for token in prompt) for step in given for prompt in step["prompts"][::GROUP]]
    calls = iter(given)
    stamps, tokens = [], []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            stamps.append(time.perf_counter())

    def rollout(prompts, trainer):
        step = next(calls)
        return {
            "prompt_ids": step["prompts"],
            "completion_ids": step["responses"],
            "logprobs": [[-10.0] * len(response) for response in step["responses"]],
            "score": step["rewards"],
        }

    def reward(prompts, completion_ids, score=None, **kwargs):
        tokens.append(sum(map(len, completion_ids)))
        return score or np.random.default_rng(len(tokens)).random(len(prompts)).tolist()

    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        loss_type="vespo",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=size.micro_batch,
        gradient_accumulation_steps=size.responses // size.micro_batch,
        num_generations=GROUP,
        max_completion_length=size.generated if generate else size.longest,
        beta=0.0,
        max_steps=steps + 1,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        save_strategy="no",
        report_to="none",
        logging_steps=1000,
        disable_tqdm=True,
        shuffle_dataset=False,
        temperature=1.0,
        generation_kwargs={"min_new_tokens": size.generated} if generate else None,
    )
    trainer = GRPOTrainer(
        model,
        reward,
        config,
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer,
        callbacks=[Clock()],
        rollout_func=None if generate else rollout,
    )
    trainer.train()
    return {"seconds": np.diff(stamps).tolist(), "tokens": tokens[1:], "peak": peak_bytes()}


def run_ours(size: Size, folder: Path, steps: int, generate: bool) -> dict:
    """This project's policy, objective, packing and (end to end) in-process engine; seconds of every step."""
    import asyncio

    import torch

    from benchmarks.training_step import train_step
    from vespo_megatron.data.batch import Batch
    from vespo_megatron.data.sample import Sample
    from vespo_megatron.megatron import parallel
    from vespo_megatron.megatron.policy import MegatronPolicy
    from vespo_megatron.rollout_sglang.engine import GenerationRequest, SamplingParams
    from vespo_megatron.rollout_sglang.in_process.engine import InProcessEngine
    from vespo_megatron.trainer.objective import Objective

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    recipe = Recipe().with_values(
        {
            "policy.model_name": str(folder),
            "policy.precision": "float32",
            "policy.train_global_batch_size": size.responses,
            "policy.sequence_packing.train_mb_tokens": size.micro_batch_tokens,
            "policy.megatron_cfg.optimizer.lr": 1e-5,
        }
    )
    store = f"file://{tempfile.mkdtemp()}/store"
    rank_info = parallel.initialize(recipe.policy.megatron_cfg, seed=1, device=torch.device("cpu"), init_method=store)
    policy = MegatronPolicy(recipe.policy, rank_info, total_updates=1000)
    objective = Objective(recipe.loss_fn, recipe.behavior)
    engine = InProcessEngine(folder, return_routes=False) if generate else None
    sampling = SamplingParams(temperature=1.0, max_new_tokens=size.generated)

    def rollout(step: int) -> tuple[list[list[int]], list[np.ndarray]]:
        given = samples(size, step)
        if engine is None:
            return given["responses"], [np.full(len(each), -10.0) for each in given["responses"]]
        requests = [
            GenerationRequest(request_id=str(index), prompt_ids=tuple(prompt), sampling=sampling, seed=index)
            for index, prompt in enumerate(given["prompts"])
        ]
        results = asyncio.run(engine.generate(requests))
        return [result.output_ids.tolist() for result in results], [result.behavior_log_probs for result in results]

    seconds, tokens = [], []
    for step in range(steps + 1):
        started = time.perf_counter()
        given = samples(size, step)
        responses, log_probs = rollout(step)
        rewards = np.asarray(given["rewards"]).reshape(-1, GROUP)
        advantages = (rewards - rewards.mean(1, keepdims=True)) / rewards.std(1, keepdims=True, ddof=1)
        made = [
            Sample(
                sample_id=str(index),
                prompt_id=str(index // GROUP),
                prompt_ids=np.asarray(prompt),
                response_ids=np.asarray(response),
                behavior_log_probs=log_prob,
                weight_versions=np.full(len(response), step),
                finish_reason="stop",
            )
            for index, (prompt, response, log_prob) in enumerate(
                zip(given["prompts"], responses, log_probs, strict=True)
            )
        ]
        train_step(Batch(made, advantages.reshape(-1).astype(np.float32)), recipe, policy, objective)
        if engine is not None:
            engine.update_weights(policy.exporter.stream(), step + 1)
        seconds.append(time.perf_counter() - started)
        tokens.append(sum(map(len, responses)))
    return {"seconds": seconds[1:], "tokens": tokens[1:], "peak": peak_bytes()}


SIDES = {"TRL": run_trl, "ours": run_ours}


def measured_apart(side: str, name: str, folder: Path, steps: int, generate: bool) -> dict:
    """One side in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--size", name, "--folder", str(folder)]
    command += ["--steps", str(steps)] + (["--generate"] if generate else [])
    found = subprocess.run(command, capture_output=True, text=True, env=trainer_environment(Recipe()) | os.environ)
    if found.returncode:
        raise RuntimeError(f"{side} failed:\n{found.stderr[-4000:]}")
    return json.loads(found.stdout.splitlines()[-1])


def compare(name: str, steps: int, rounds: int, generate: bool) -> str:
    """The markdown rows of one size and part."""
    size = SIZES[name]
    with tempfile.TemporaryDirectory() as folder:
        make_model(size, Path(folder))
        found: dict[str, list[dict]] = {side: [] for side in SIDES}
        for _ in range(rounds):
            for side in SIDES:
                found[side].append(measured_apart(side, name, Path(folder), steps, generate))
    took = {side: statistics.median(s for run in runs for s in run["seconds"]) for side, runs in found.items()}
    peak = {side: statistics.median(run["peak"] for run in runs) for side, runs in found.items()}
    part = "end to end" if generate else "training part"
    return "\n".join(
        f"| {name} | {part} | {side} | {took[side]:.3f} | {size.responses / took[side]:.1f} "
        f"| {took['TRL'] / took[side]:.2f} | {peak[side] / 2**20:.0f} | {peak[side] / peak['TRL']:.2f} |"
        for side in SIDES
    )


def main() -> None:
    """Measure, print, and with --record write to RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--parts", nargs="+", choices=("train", "generate"), default=["train", "generate"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--record", action="store_true", help="write to benchmarks/RESULTS.md")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--generate", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        warnings.simplefilter("ignore")
        size = SIZES[arguments.size[0]]
        print(json.dumps(SIDES[arguments.side](size, Path(arguments.folder), arguments.steps, arguments.generate)))
        return
    from benchmarks.results import record

    for name in arguments.size:
        facts = {key: value for key, value in asdict(SIZES[name]).items() if key != "model"}
        lines = [
            f"{SIZES[name].model}; {facts}; median of {arguments.rounds} × {arguments.steps} steps.",
            "",
            "| size | part | side | s/step | responses/s | over TRL | peak memory (MiB) | over TRL's |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [compare(name, arguments.steps, arguments.rounds, part == "generate") for part in arguments.parts]
        text = "\n".join(lines)
        print(text, flush=True)
        if arguments.record:
            record(f"A step against TRL: {name}", text)


if __name__ == "__main__":
    main()
