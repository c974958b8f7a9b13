"""What the rollout tests share: requests, and an independent reference for an engine's numbers."""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass
from typing import Any

import numpy as np

from vespo_megatron.rollout_sglang.engine import GenerationRequest, SamplingParams


@dataclass
class Reference:
    """transformers' `Qwen3MoeForCausalLM`: what an engine's numbers are compared with."""

    model: Any
    folder: str

    def score(self, request, result, temperature=1.0):
        """Log-probs float64 [R] and sorted experts [P + R - 1, sparse layers, topk] of one unpadded forward."""
        import torch

        ids = torch.tensor([[*request.prompt_ids, *result.output_ids.tolist()]])
        with torch.no_grad():
            output = self.model(ids, output_router_logits=True)
        log_probs = torch.log_softmax(output.logits[0].double() / temperature, -1)
        start = len(request.prompt_ids)
        positions = torch.arange(start - 1, ids.shape[1] - 1)
        routes = [logits.topk(self.model.config.num_experts_per_tok).indices for logits in output.router_logits]
        routes = torch.stack(routes, 1)[:-1]
        return log_probs[positions, ids[0, start:]].numpy(), np.sort(routes.numpy(), -1)

    def distributions(self, request, result, temperature=1.0):
        """Probabilities float64 [R, vocabulary] that each token of the response was drawn from, before truncation."""
        import torch

        ids = torch.tensor([[*request.prompt_ids, *result.output_ids.tolist()]])
        with torch.no_grad():
            logits = self.model(ids).logits[0, len(request.prompt_ids) - 1 : -1]
        return torch.softmax(logits.double() / temperature, -1).numpy()

    def named_tensors(self, scale=0.0, seed=0):
        """The weights by their names on disk, each perturbed by `scale` of its own spread; loads them here too."""
        import torch
        from safetensors.torch import load_file

        generator = torch.Generator().manual_seed(seed)
        for name, tensor in load_file(f"{self.folder}/model.safetensors").items():
            yield name, tensor + scale * tensor.std() * torch.randn(tensor.shape, generator=generator)

    def with_weights(self, named_tensors):
        """A reference that holds these tensors."""
        from safetensors.torch import save_file
        from transformers import Qwen3MoeForCausalLM

        with tempfile.TemporaryDirectory() as folder:
            self.model.config.save_pretrained(folder)
            save_file(dict(named_tensors), f"{folder}/model.safetensors", metadata={"format": "pt"})
            return Reference(Qwen3MoeForCausalLM.from_pretrained(folder, dtype="float32").eval(), self.folder)


def make_requests(count, *, group_size=2, max_new_tokens=16, longest_prompt=40, **sampling):
    """Ragged prompts, `group_size` requests to each."""
    generator = np.random.default_rng(3)
    prompts = [
        tuple(generator.integers(2, 128, size=generator.integers(1, longest_prompt)).tolist()) for _ in range(count)
    ]
    params = SamplingParams(max_new_tokens=max_new_tokens, **sampling)
    return [
        GenerationRequest(f"r{i}", prompts[i // group_size], params, group_id=f"g{i // group_size}", seed=i)
        for i in range(count)
    ]


def generate(engine, requests, **keywords):
    return asyncio.run(asyncio.wait_for(engine.generate(requests, **keywords), 120))
