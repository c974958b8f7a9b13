"""Responses that were drawn before, in one pass over prompt and response: what a server calls prefill."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vespo_megatron.rollout_sglang.engine import ScoredResponse
from vespo_megatron.rollout_sglang.in_process.model import CachedDecoder


def score(
    model: CachedDecoder,
    responses: Sequence[tuple[np.ndarray, np.ndarray]],
    temperature: float,
    weight_version: int,
) -> list[ScoredResponse]:
    """(Prompt ids, response ids) of each → its scores and every layer's output; call it under `torch.inference_mode`.

    Args:
        weight_version: of the model's weights; the routes that flip are a function of it.
    """
    sequences = [np.concatenate([prompt, response]) for prompt, response in responses]
    ids = np.zeros((len(sequences), max(map(len, sequences))), dtype=np.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence
    flips = model.mismatch.flips_along(ids, weight_version, model.shape.moe_layers)
    logits, outputs = model.score(torch.from_numpy(ids).to(model.device), flips)
    log_probs = torch.log_softmax(logits / temperature, dim=-1)
    scored = []
    for row, (prompt, response) in enumerate(responses):
        predicting = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
        drawn = torch.from_numpy(np.ascontiguousarray(response, dtype=np.int64)).to(model.device)
        own = log_probs[row, predicting].gather(1, drawn[:, None])[:, 0]
        hidden = torch.stack([output[row, predicting].float() for output in outputs])
        scored.append(ScoredResponse(own.cpu().numpy(), hidden.cpu().numpy()))
    return scored
