"""What the workers do for the precision flow: passes with rounded weights, and what is left after them."""

from __future__ import annotations

from typing import Any

import layout_work
import torch

from vespo_megatron.megatron import parallel
from vespo_megatron.megatron.policy import MegatronPolicy
from vespo_megatron.megatron.rounded_weights import RoundedWeights
from vespo_megatron.quantization import WeightQuantizer
from vespo_megatron.recipe.schema import QuantizationConfig


def build(
    folder: str, layout: dict[str, Any], store: str, flow: dict[str, Any], precision: str = "float32"
) -> MegatronPolicy:
    config = layout_work.policy_config(folder, layout, quantization=QuantizationConfig(**flow))
    rank_info = parallel.initialize(config.megatron_cfg, seed=1, device=torch.device("cpu"), init_method=store)
    return MegatronPolicy(config.with_values({"precision": precision}), rank_info)


def in_use(folder: str, layout: dict[str, Any], store: str, flow: dict[str, Any], precision: str) -> tuple[dict, dict]:
    """The weights by HF name (on rank 0) while they are rounded, and after that."""
    policy = build(folder, layout, store, flow, precision)
    quantizer = WeightQuantizer.of(policy.config)
    with RoundedWeights(policy.chunks, policy.shape, policy.rank_info, quantizer).in_use():
        rounded = layout_work.weights(policy)
    return rounded, layout_work.weights(policy)


def passes(folder: str, layout: dict[str, Any], store: str, flow: dict[str, Any]) -> dict[str, Any]:
    """Gradients by HF name, and whether every weight of this rank was its own again after each kind of pass."""
    policy = build(folder, layout, store, flow)
    policy.keep_reference()
    batches = layout_work.micro_batches(policy, layout_work.ragged_batch())
    own = [weight.clone() for weight in policy.weights()]

    def unchanged() -> bool:
        return all(torch.equal(now, then) for now, then in zip(policy.weights(), own, strict=True))

    found: dict[str, Any] = {}
    live = policy.log_probs(batches)
    found["log_probs"] = unchanged()
    found["gradients"] = layout_work.gradients(policy, batches, layout_work.weighted_loss)["gradients"]
    found["backward"] = unchanged()
    reference = policy.ref_log_probs(batches)
    found["reference"] = unchanged() and all(torch.equal(a, b) for a, b in zip(live, reference, strict=True))
    refused = policy.update(batches, layout_work.weighted_loss, before_step=lambda _: False)
    found["refused update"] = unchanged() and not refused.succeeded
    return found


def after_a_failure(folder: str, layout: dict[str, Any], store: str, flow: dict[str, Any]) -> bool:
    """Whether the weights are its own again after a pass that ended in the middle."""
    policy = build(folder, layout, store, flow)
    own = [weight.clone() for weight in policy.weights()]
    forwards = []

    def stop() -> None:
        forwards.append([weight.clone() for weight in policy.weights()])
        if len(forwards) == 2:
            raise InterruptedError

    policy.on_progress = stop
    try:
        policy.log_probs(layout_work.micro_batches(policy, layout_work.ragged_batch()))
    except InterruptedError:
        rounded = any(not torch.equal(now, then) for now, then in zip(forwards[1], own, strict=True))
        return rounded and all(torch.equal(now, then) for now, then in zip(policy.weights(), own, strict=True))
    return False


def after_updates(folder: str, layout: dict[str, Any], store: str, flow: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights by HF name (on rank 0) after three updates with a pass before each."""
    policy = build(folder, layout, store, flow)
    batches = layout_work.micro_batches(policy, layout_work.ragged_batch())
    for _ in range(3):
        policy.log_probs(batches)
        policy.update(batches, layout_work.weighted_loss)
    return layout_work.weights(policy)
