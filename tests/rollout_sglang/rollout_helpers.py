"""What the rollout tests share: requests, and an independent reference for an engine's numbers."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import tempfile
from dataclasses import dataclass
from typing import Any

import numpy as np

from vespo_megatron.rollout_sglang.engine import GenerationRequest, SamplingParams

VOCAB, CONTEXT = 96, 64
"""Of `write_model_with_a_dense_layer`'s model."""


@dataclass
class Reference:
    """transformers' `Qwen3MoeForCausalLM`: what an engine's numbers are compared with."""

    model: Any
    folder: str

    def score(self, request, result, temperature=1.0):
        """Log-probs float64 [R] and sorted experts [P + R - 1, sparse layers, topk] of one unpadded forward.

        Where two experts are equal up to rounding, the engine's choice among them is taken.
        """
        import torch

        ids = torch.tensor([[*request.prompt_ids, *result.output_ids.tolist()]])
        routers = [module for name, module in self.model.named_modules() if name.endswith(".mlp.gate")]
        engine = [None] * len(routers)
        if result.routes is not None:
            engine = torch.from_numpy(result.routes.astype(np.int64)).unbind(1)
        routes: list[torch.Tensor] = []
        hooks = [
            router.register_forward_hook(_settle_ties(chosen, routes))
            for router, chosen in zip(routers, engine, strict=True)
        ]
        try:
            with torch.no_grad():
                logits = self.model(ids).logits[0]
        finally:
            for hook in hooks:
                hook.remove()
        log_probs = torch.log_softmax(logits.double() / temperature, -1)
        start = len(request.prompt_ids)
        positions = torch.arange(start - 1, ids.shape[1] - 1)
        return log_probs[positions, ids[0, start:]].numpy(), np.sort(torch.stack(routes, 1)[:-1].numpy(), -1)

    @staticmethod
    def score_on_one_cache(models, request, result):
        """As `score`, where each row runs by the model of its version, on the keys and values that earlier ones left.

        `models`: version → reference.
        """
        import torch
        from transformers import DynamicCache

        ids = torch.tensor([*request.prompt_ids, *result.output_ids.tolist()])
        cache, logits, routes = DynamicCache(), [], []
        bounds = np.flatnonzero(np.diff(result.route_versions, prepend=-1, append=-1))
        for start, stop in itertools.pairwise(bounds):
            part, chosen = models[result.route_versions[start]], result.routes[start:stop]
            with part.routed(chosen, routes), torch.no_grad():
                logits.append(part.model(ids[None, start:stop], past_key_values=cache, use_cache=True).logits[0])
        log_probs = torch.log_softmax(torch.cat(logits).double(), -1)
        rows = torch.arange(len(request.prompt_ids) - 1, len(ids) - 1)
        return log_probs[rows, ids[rows + 1]].numpy(), np.concatenate(routes)

    @contextlib.contextmanager
    def routed(self, chosen, found):
        """Within, forwards append their sorted experts [rows, sparse layers, topk] to `found` at the end."""
        import torch

        routes = []
        routers = [module for name, module in self.model.named_modules() if name.endswith(".mlp.gate")]
        engine = torch.from_numpy(chosen.astype(np.int64)).unbind(1)
        hooks = [
            router.register_forward_hook(_settle_ties(each, routes))
            for router, each in zip(routers, engine, strict=True)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        found.append(np.sort(torch.stack(routes, 1).numpy(), -1))

    def hidden(self, request, result):
        """float32 [layers, R, hidden size], each layer's output where the response's tokens are predicted."""
        import torch

        ids = torch.tensor([[*request.prompt_ids, *result.output_ids.tolist()]])
        outputs = []
        hooks = [
            layer.register_forward_hook(lambda _m, _i, out: outputs.append(out[0] if isinstance(out, tuple) else out))
            for layer in self.model.model.layers
        ]
        try:
            with torch.no_grad():
                self.model(ids)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack([output[0, len(request.prompt_ids) - 1 : -1] for output in outputs]).numpy()

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


def _settle_ties(chosen, routes):
    """A hook for transformers' router (logits, gates, experts) that appends the experts to `routes`.

    The experts an engine has `chosen` of the first rows [rows, topk] are taken where the worst of them is as good as
    the worst of the router's own, up to rounding.
    """
    import torch

    def hook(router, inputs, output):
        logits, gates, experts = output
        if chosen is not None:
            rows = len(chosen)
            tied = logits[:rows].gather(1, chosen).amin(1) >= logits[:rows].gather(1, experts[:rows]).amin(1) - 1e-5
            distinct = chosen.sort(dim=1).values.diff(dim=1).all(dim=1)
            experts = experts.clone()
            experts[:rows] = torch.where((tied & distinct)[:, None], chosen, experts[:rows])
            gates = torch.softmax(logits.float(), -1).gather(1, experts)
            gates = gates / gates.sum(-1, keepdim=True) if router.norm_topk_prob else gates
        routes.append(experts)
        return logits, gates.to(logits.dtype), experts

    return hook


def write_model_with_a_dense_layer(folder):
    """A random model with one dense layer among its MoE layers, saved as transformers saves it."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        mlp_only_layers=[1],
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
    )
    model = Qwen3MoeForCausalLM(config)
    for name, parameter in model.named_parameters():  # norms at one would hide a norm that is not applied
        if name.endswith("norm.weight"):
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)


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
