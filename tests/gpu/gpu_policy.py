"""A small policy on the device at hand, samples for it, and what transformers says of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from vespo_megatron.data.batch import Batch
from vespo_megatron.data.sample import Sample
from vespo_megatron.megatron.micro_batch import MicroBatch, prepare
from vespo_megatron.megatron.parallel import RankInfo
from vespo_megatron.megatron.policy import MegatronPolicy
from vespo_megatron.recipe.model_shape import read_shape
from vespo_megatron.recipe.schema import PolicyConfig

VOCAB, TEMPERATURE = 126, 0.9
LENGTHS = ((5, 7), (3, 1), (20, 41), (1, 9), (9, 13), (2, 60), (17, 3), (1, 1))
"""Of prompts and responses."""
MOE_LAYERS, EXPERTS, TOPK = 3, 8, 2


def make_checkpoint(folder: Path, **changes: Any) -> Path:
    """A random Qwen3-MoE of four layers, the second of them dense, with weights that are spread out."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    settings = dict(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        num_experts=EXPERTS,
        num_experts_per_tok=TOPK,
        norm_topk_prob=True,
        mlp_only_layers=[1],
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**(settings | changes))).float()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(0, 0.1)
            else:
                parameter.data.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return folder


def make_batch(seed: int = 0, lengths: tuple = LENGTHS, *, routed: bool = False) -> Batch:
    """Samples whose log μ are the coefficients of `linear_loss`; `routed`: with routes that no router would choose."""
    generator = np.random.default_rng(seed)
    samples = [
        Sample(
            sample_id=f"s{index}",
            prompt_id=f"p{index // 4}",
            prompt_ids=generator.integers(0, VOCAB, prompt),
            response_ids=generator.integers(0, VOCAB, response),
            behavior_log_probs=-5 + generator.normal(0, 1, response),
            weight_versions=np.zeros(response),
            finish_reason="stop",
        )
        for index, (prompt, response) in enumerate(lengths)
    ]
    for sample in samples if routed else ():
        order = generator.random((sample.num_tokens - 1, MOE_LAYERS, EXPERTS)).argsort(axis=-1)
        sample.routes, sample.route_versions = order[..., :TOPK].astype(np.uint8), np.zeros(len(order), np.int64)
    return Batch(samples, generator.normal(0, 1, len(samples)).astype(np.float32))


def make_policy(folder: Path, rank_info: RankInfo, precision: str = "float32", **megatron: Any) -> MegatronPolicy:
    """Adam's eps is large enough that the rounding of near-zero gradients makes no full steps."""
    values = {"optimizer.lr": 1e-3, "optimizer.adam_eps": 1e-5} | megatron
    config = PolicyConfig(model_name=str(folder), precision=precision)
    config = config.with_values({f"megatron_cfg.{name}": value for name, value in values.items()})
    return MegatronPolicy(config, rank_info)


def micro_batches(policy: MegatronPolicy, batch: Batch, count: int = 2) -> list[MicroBatch]:
    parts = [batch.select(list(range(index, len(batch), count))) for index in range(count)]
    return prepare(parts, policy.rank_info, temperature=TEMPERATURE, log_prob_bytes=1 << 14)


def linear_loss(log_probs: torch.Tensor, entropies: torch.Tensor, micro_batch: MicroBatch):
    """Linear in log-probs and entropies, each token with a weight of its own, without a look at the host."""
    weights = micro_batch.behavior_log_probs
    value = (log_probs * weights).sum() / 200 + entropies.sum() / 300
    return value, value.detach().clone()


def by_sample(batches: list[MicroBatch], outputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sample → [log-probs, entropies]."""
    found = {}
    for each, output in zip(batches, outputs, strict=True):
        parts = output.split(each.cu_seqlens.diff().tolist(), dim=1)
        found |= {sample.sample_id: part for sample, part in zip(each.batch.samples, parts, strict=True)}
    return found


def gradients(policy: MegatronPolicy, batches: list[MicroBatch], **options: Any) -> dict[str, torch.Tensor]:
    """Every weight's gradient of `linear_loss`, by HF name, in float32."""
    policy.compute_gradients(batches, linear_loss, everywhere=True, **options)
    stream = policy.exporter.stream(lambda parameter: parameter.main_grad)
    scale = 1.0 if policy.loss_scale is None else policy.loss_scale.value
    return {name: tensor.float() / scale for name, tensor in stream}


def weights(policy: MegatronPolicy) -> dict[str, torch.Tensor]:
    """Every weight, by HF name."""
    return {name: tensor.clone() for name, tensor in policy.exporter.stream()}


class Transformers:
    """transformers' model of a folder, with every weight rounded to a dtype or as it is; it computes in `dtype`."""

    def __init__(
        self, folder: Path, dtype: torch.dtype, device: torch.device, *, rounded: torch.dtype | None = None
    ) -> None:
        from transformers import Qwen3MoeForCausalLM

        self.device, self.dtype = device, dtype
        self.shape = read_shape(folder)
        self.model = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model.set_experts_implementation("eager")
        for parameter in self.model.parameters():
            if rounded is not None:
                parameter.data = parameter.data.to(rounded).float()
            parameter.data = parameter.data.to(dtype)
        self.model.to(device)

    def score(self, sample: Sample) -> torch.Tensor:
        """[log-probs, entropies] of a response."""
        tokens = torch.from_numpy(sample.token_ids).to(self.device)
        response = len(sample.response_ids)
        logits = self.model(tokens[None]).logits[0, -response - 1 : -1]
        distribution = (logits.to(torch.promote_types(self.dtype, torch.float32)) / TEMPERATURE).log_softmax(-1)
        found = distribution.gather(-1, tokens[-response:, None])[:, 0]
        return torch.stack([found, -(distribution.exp() * distribution).sum(-1)])

    def scores(self, batch: Batch) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return {sample.sample_id: self.score(sample) for sample in batch.samples}

    def gradients(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Of `linear_loss`, by HF name."""
        from vespo_megatron.rollout_sglang.in_process.model import weight_views

        for sample in batch.samples:
            scores = self.score(sample)
            weight = torch.from_numpy(sample.behavior_log_probs).to(scores)
            ((scores[0] * weight).sum() / 200 + scores[1].sum() / 300).backward()
        for parameter in self.model.parameters():
            parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        return weight_views(self.model, self.shape)
