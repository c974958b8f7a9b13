"""What the workers do: build the policy in a layout and return what a test compares."""

from __future__ import annotations

import functools
import unittest.mock
from typing import Any

import numpy as np
import torch

from vespo_megatron.data.batch import Batch
from vespo_megatron.data.sample import Sample
from vespo_megatron.errors import UserError
from vespo_megatron.losses import Normalizer
from vespo_megatron.megatron import hf_weights, parallel
from vespo_megatron.megatron.micro_batch import MicroBatch, layouts, prepare
from vespo_megatron.megatron.policy import LIVE, MegatronPolicy, RouteUse
from vespo_megatron.recipe.schema import LossConfig, PolicyConfig
from vespo_megatron.routing_replay.table import RouteTable, slice_routes
from vespo_megatron.trainer.expert_load import stage_load
from vespo_megatron.trainer.objective import Objective
from vespo_megatron.trainer.router_loss_metrics import stage_losses

# Prompt and response lengths: a single response token, a response longer than any context-parallel chunk of another,
# a prompt longer than its response, and lengths that no parallel size divides.
LENGTHS = (
    (5, 7),
    (3, 1),
    (20, 41),
    (1, 9),
    (9, 13),
    (2, 30),
    (17, 3),
    (4, 4),
    (6, 11),
    (1, 1),
    (8, 19),
    (3, 23),
    (2, 2),
    (12, 5),
    (7, 6),
    (5, 17),
)
VOCAB = 126


def ragged_batch(seed: int = 0) -> Batch:
    """Sixteen samples with behaviour log-probs of a plausible size and advantages of both signs."""
    generator = np.random.default_rng(seed)
    samples = [
        Sample(
            sample_id=f"s{index}",
            prompt_id=f"p{index // 4}",
            prompt_ids=generator.integers(0, VOCAB, prompt),
            response_ids=generator.integers(0, VOCAB, response),
            behavior_log_probs=-5 + generator.normal(0, 0.3, response),
            weight_versions=np.zeros(response),
            finish_reason="stop",
            loss_mask=generator.random(response) > 0.1 if response > 1 else None,
        )
        for index, (prompt, response) in enumerate(LENGTHS)
    ]
    return Batch(samples, generator.normal(0, 1, len(samples)).astype(np.float32))


def policy_config(folder: str, layout: dict[str, Any], **changes: Any) -> PolicyConfig:
    # Adam's first step is lr · g / (|g| + eps): a small eps turns the rounding of near-zero gradients into full steps.
    megatron = {"optimizer.lr": 1e-3, "optimizer.adam_eps": 1e-5, "distributed_timeout": 60.0} | layout
    config = PolicyConfig(model_name=folder, **({"precision": "float32"} | changes))
    return config.with_values({f"megatron_cfg.{name}": value for name, value in megatron.items()})


CPU = torch.device("cpu")


def build(
    folder: str, layout: dict[str, Any], store: str, device: torch.device = CPU, **changes: Any
) -> MegatronPolicy:
    config = policy_config(folder, layout, **changes)
    rank_info = parallel.initialize(config.megatron_cfg, seed=1, device=device, init_method=store)
    return MegatronPolicy(config, rank_info)


def micro_batches(policy: MegatronPolicy, batch: Batch, count: int = 4) -> list[MicroBatch]:
    """This data parallel rank's share of the batch in `count` micro-batches."""
    rank_info = policy.rank_info
    mine = list(range(len(batch)))[rank_info.data_rank :: rank_info.data_size]
    return prepare(
        [batch.select(mine[index::count]) for index in range(count)], rank_info, temperature=0.9, log_prob_bytes=4096
    )


def weighted_loss(log_probs: torch.Tensor, entropies: torch.Tensor, micro_batch: MicroBatch):
    """−Σ A · log π / D: linear in the log-probs, with each sequence's own advantage."""
    counts = micro_batch.cu_seqlens.diff().to(log_probs.device, non_blocking=True)
    advantages = micro_batch.advantages.repeat_interleave(counts, output_size=len(log_probs))
    value = -(log_probs * advantages * micro_batch.mask).sum() / 200
    return value, value.detach().clone()


def gradients(policy: MegatronPolicy, batches: list[MicroBatch], loss, routes: RouteUse = LIVE) -> dict[str, Any]:
    """This rank's share of the loss, and every gradient with its HF name (on rank 0)."""
    reports = policy.compute_gradients(batches, loss, routes=routes, everywhere=True)
    scale = 1.0 if policy.loss_scale is None else policy.loss_scale.value
    named = {name: tensor / scale for name, tensor in policy.exporter.stream(lambda parameter: parameter.main_grad)}
    share = sum(reports) if reports and policy.rank_info.tensor_rank == 0 else torch.zeros(())
    return {"loss": float(share), "gradients": named}


def weights(policy: MegatronPolicy) -> dict[str, torch.Tensor]:
    """Every weight with its HF name (on rank 0)."""
    return {name: tensor.clone() for name, tensor in policy.exporter.stream()}


def everything(folder: str, layout: dict[str, Any], store: str, device: torch.device = CPU) -> dict[str, Any]:
    """All that a layout must share with one process, from one set-up of it.

    The weights as loaded; loss and gradients with live routers and with the samples' random routes (R3); the change of
    every weight in one update; gradients after that update with the routes recorded before it (R2). No R2 and R3 of a
    model without routers.
    """
    policy = build(folder, layout, store, device)
    answers: dict[str, Any] = {"loaded": weights(policy)}
    moe_layers = policy.shape.num_moe_layers
    if not moe_layers:
        batches = micro_batches(policy, ragged_batch())
        answers["live"] = gradients(policy, batches, weighted_loss)
        answers |= _one_update(policy, batches, answers["loaded"])
        return answers
    batches = routed_micro_batches(policy, with_random_routes(ragged_batch(), layers=moe_layers))
    engine = RouteUse("replay", lambda each: (each.engine_routes, None))
    trainer = RouteUse("replay", lambda each: (each.trainer_routes, None))
    answers["live"] = gradients(policy, batches, weighted_loss)
    answers["R3"] = gradients(policy, batches, weighted_loss, engine)
    for each in batches:
        each.trainer_routes = policy.empty_routes(each)
    policy.log_probs(batches, routes=RouteUse("record", trainer.tables))
    answers |= _one_update(policy, batches, answers["loaded"])
    answers["R2"] = gradients(policy, batches, weighted_loss, trainer)
    return answers


def _one_update(policy: MegatronPolicy, batches: list[MicroBatch], before: dict[str, torch.Tensor]) -> dict[str, Any]:
    norm = policy.update(batches, weighted_loss).grad_norm
    return {"grad_norm": norm, "update": {name: tensor - before[name] for name, tensor in weights(policy).items()}}


def messages(folder: str, layout: dict[str, Any], store: str) -> set[str]:
    """The collectives of one update, by name."""
    policy = build(folder, layout, store)
    batches = micro_batches(policy, ragged_batch())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        policy.update(batches, weighted_loss)
    return {event.key for event in profile.key_averages() if event.key.startswith("c10d::")}


CORRECTION = {
    "weight": "tis",
    "high": 1.02,
    "normalize": True,
    "denominator": "kept",
    "reject": [{"statistic": "k3", "level": "mean", "high": 0.0013}],
}
WHOLE_MINI_BATCH = {
    "by entropy": (LossConfig(name="grpo", hyperparameters={"top_entropy_fraction": 0.3}), "rollout"),
    "M2PO": (LossConfig(name="m2po", hyperparameters={"m2_threshold": 0.001}), "rollout"),
    "corrected, three policies": (LossConfig(name="grpo", correction=CORRECTION), "recompute"),
    "corrected, two policies": (LossConfig(name="reinforce", correction=CORRECTION), "rollout"),
}
"""What is counted or searched for over the mini-batch before its first micro-batch: (loss_fn, behaviour)."""


def objectives(
    folder: str, layout: dict[str, Any], store: str, names, behavior: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Objective → loss and gradients, on samples whose μ is `behavior`."""
    policy = build(folder, layout, store)
    batch = ragged_batch()
    for sample in batch.samples:
        sample.behavior_log_probs = behavior[sample.sample_id]
    batches = micro_batches(policy, batch)
    normalizer = Normalizer.from_lengths([int(sample.loss_mask.sum()) for sample in batch.samples])

    def loss_of(name: str):
        objective = Objective(*WHOLE_MINI_BATCH.get(name, (LossConfig(name=name), "rollout")))
        if objective.needs_old_log_probs:
            for micro_batch, output in zip(batches, policy.log_probs(batches), strict=False):
                micro_batch.old_log_probs = output[0]
        config, counts = objective.over_mini_batch(policy, batches, LIVE, normalizer)
        of_micro_batch = objective.loss_function(counts, config)

        def loss(log_probs, entropies, micro_batch):
            value, _ = of_micro_batch(log_probs, entropies, micro_batch)
            return value, value.detach().clone()

        return loss

    return {name: gradients(policy, batches, loss_of(name)) for name in names}


def log_probs(folder: str, layout: dict[str, Any], store: str, **changes: Any) -> list[tuple] | None:
    """(layout, sample ids, [log-probs, entropies]) of each micro-batch of this (data, context) shard."""
    policy = build(folder, layout, store, **changes)
    batches = micro_batches(policy, ragged_batch(), count=2)
    outputs = policy.log_probs(batches)
    if not policy.rank_info.reports:
        return None
    return [
        (batch.layout, [s.sample_id for s in batch.batch.samples], out.numpy())
        for batch, out in zip(batches, outputs, strict=False)
    ]


def save_folder(folder: str, layout: dict[str, Any], store: str, target: str, **changes: Any) -> None:
    """HF → Megatron in this layout → HF, as a folder of several files."""
    policy = build(folder, layout, store, **changes)
    hf_weights.save(policy.exporter, target, copy_from=folder, shard_bytes=64 << 10)


def load_folder(folder: str, layout: dict[str, Any], store: str) -> dict[str, torch.Tensor]:
    """HF → Megatron in this layout → HF, in memory."""
    return weights(build(folder, layout, store))


# ---- routing replay ------------------------------------------------------------------------------------------------

NUM_EXPERTS, TOPK, MOE_LAYERS = 8, 2, 3  # of `conftest.make_checkpoint`: four layers, the second dense


def with_random_routes(batch: Batch, seed: int = 5, layers: int = MOE_LAYERS) -> Batch:
    """Routes that no router would choose: a slice taken from the wrong place changes every gradient."""
    generator = np.random.default_rng(seed)
    for sample in batch.samples:
        rows = sample.num_tokens - 1
        order = generator.random((rows, layers, NUM_EXPERTS)).argsort(axis=-1)
        sample.routes, sample.route_versions = order[..., :TOPK].astype(np.uint8), np.zeros(rows, np.int64)
    return batch


def routed_micro_batches(policy: MegatronPolicy, batch: Batch, count: int = 4) -> list[MicroBatch]:
    """`micro_batches`, with the samples' routes sliced for this rank."""
    rank_info = policy.rank_info
    mine = list(range(len(batch)))[rank_info.data_rank :: rank_info.data_size]
    parts = [batch.select(mine[index::count]) for index in range(count)]
    tables = [
        slice_routes(part.samples, layout, policy.moe_layers, topk=TOPK, num_experts=NUM_EXPERTS)
        for part, layout in zip(parts, layouts(parts, rank_info), strict=True)
    ]
    return prepare(parts, rank_info, temperature=0.9, log_prob_bytes=4096, routes=tables)


def replay_at_theta_old(folder: str, layout: dict[str, Any], store: str) -> bool | None:
    """Whether live, recorded and replayed log-probs are the same to the last bit."""
    policy = build(folder, layout, store)
    batches = micro_batches(policy, ragged_batch())
    for each in batches:
        each.trainer_routes = policy.empty_routes(each)
    table = lambda each: (each.trainer_routes, None)  # noqa: E731
    live = policy.log_probs(batches)
    recorded = policy.log_probs(batches, routes=RouteUse("record", table))
    replayed = policy.log_probs(batches, routes=RouteUse("replay", table))
    if not live:
        return None
    return all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(live, recorded, replayed, strict=True))


def routers_after_an_update(folder: str, layout: dict[str, Any], store: str) -> dict[str, Any]:
    """What routers do under R2 once the weights have moved: their choices, their gates, their gradient."""
    policy = build(folder, layout, store)
    policy.optimizer.param_groups[0]["lr"] = 0.05
    batches = micro_batches(policy, ragged_batch())
    for each in batches:
        each.trainer_routes = policy.empty_routes(each)
    record = RouteUse("record", lambda each: (each.trainer_routes, None))
    replay = RouteUse("replay", lambda each: (each.trainer_routes, None))
    seen: dict[int, list] = {}

    def remember(router, inputs, output):
        seen.setdefault(router.layer_number, []).append((output[0].detach().clone(), output[1].clone()))

    model = hf_weights.unwrap(policy.chunks[0])
    handles = [
        layer.mlp.router.register_forward_hook(remember)
        for layer in model.decoder.layers
        if hasattr(layer.mlp, "router")
    ]
    policy.log_probs(batches, routes=record)
    before, seen = dict(seen), {}
    policy.update(batches, weighted_loss)  # live routes: the weights move freely
    seen = {}
    policy.log_probs(batches, routes=replay)
    after, seen = seen, {}
    policy.log_probs(batches)
    live = seen
    for handle in handles:
        handle.remove()
    policy.compute_gradients(batches, weighted_loss, routes=replay, everywhere=True)
    gradients = [layer.mlp.router.weight.main_grad for layer in model.decoder.layers if hasattr(layer.mlp, "router")]
    pairs = [(layer, index) for layer in before for index in range(len(batches))]
    chosen = {}
    for column, layer in enumerate(policy.replay.layer_numbers):
        for index, each in enumerate(batches):
            chosen[layer, index] = torch.zeros(after[layer][index][1].shape, dtype=torch.bool).scatter_(
                1, torch.from_numpy(each.trainer_routes.experts[:, column].astype(np.int64)), True
            )
    return {
        "layers": policy.replay.layer_numbers,
        "replayed_is_recorded": all(torch.equal(after[layer][i][1], chosen[layer, i]) for layer, i in pairs),
        "live_moved": any(not torch.equal(live[layer][i][1], before[layer][i][1]) for layer, i in pairs),
        "gates_moved": all(not torch.equal(after[layer][i][0], before[layer][i][0]) for layer, i in pairs),
        "gradient_norms": [float(gradient.norm()) for gradient in gradients],
    }


def router_gradient(folder: str, layout: dict[str, Any], store: str) -> dict[str, float]:
    """A router's gates and gradient under replay against the dense formula g = I·e^s / Σ I·e^s, in float64."""
    policy = build(folder, layout | {"moe_router_dtype": "fp64"}, store)
    router = hf_weights.unwrap(policy.chunks[0]).decoder.layers[0].mlp.router.double()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(10, 1, 64, dtype=torch.float64, generator=generator)
    weights = torch.randn(10, NUM_EXPERTS, dtype=torch.float64, generator=generator)
    table = RouteTable.empty(10, len(policy.replay.hooks), TOPK, NUM_EXPERTS)
    table.experts[:] = (
        np.random.default_rng(0).random((10, len(policy.replay.hooks), NUM_EXPERTS)).argsort(-1)[..., :TOPK]
    )
    policy.replay._mode = "replay"
    with policy.replay.forward(0, table, None, torch.device("cpu"), torch.ones(10, dtype=torch.bool)):
        gates, _ = router(hidden)
    policy.replay._mode = "off"
    (ours,) = torch.autograd.grad((gates * weights).sum(), router.weight)

    weight = router.weight.detach().clone().requires_grad_()
    mask = torch.zeros(10, NUM_EXPERTS, dtype=torch.float64).scatter_(
        1, torch.from_numpy(table.experts[:, 0].astype(np.int64)), 1.0
    )
    exponentials = mask * (hidden[:, 0] @ weight.t()).exp()
    dense = exponentials / exponentials.sum(-1, keepdim=True)
    (expected,) = torch.autograd.grad((dense * weights).sum(), weight)
    return {
        "gates": float((gates - dense).abs().max()),
        "gradient": float((ours - expected).abs().max()),
        "norm": float(ours.norm()),
    }


def broken_replay(folder: str, layout: dict[str, Any], store: str, fault: str) -> str:
    """The message of the error a fault in replay ends with; whether the state was restored is checked on the way."""
    policy = build(folder, layout, store)
    batches = routed_micro_batches(policy, with_random_routes(ragged_batch()))
    use = RouteUse("replay", lambda each: (each.engine_routes, None))
    model = hf_weights.unwrap(policy.chunks[0])
    first = model.decoder.layers[0].mlp.router
    if fault == "orphan":
        first.router_replay = None
    elif fault == "twice":
        call = first.forward
        first.forward = lambda *inputs: (call(*inputs), call(*inputs))[1]
    elif fault == "rows":
        batches[0].engine_routes = batches[2].engine_routes
    elif fault == "missing":
        batches[2].engine_routes = None
    try:
        policy.compute_gradients(batches, weighted_loss, routes=use)
    except UserError as error:
        assert policy.replay._mode == "off" and policy.replay._current is None
        assert all(not hook.pending and not hook.forwards for hook in policy.replay.hooks)
        return str(error)
    return "no error"


def expert_load(folder: str, layout: dict[str, Any], store: str, routes: str) -> dict[str, Any]:
    """The load of one update as this rank reports it, and what the routers' own outputs say (one process).

    Args:
        routes: live, or R3, the samples' random routes.
    """
    policy = build(folder, layout, store)
    batches = routed_micro_batches(policy, with_random_routes(ragged_batch()))
    use = RouteUse("replay", lambda each: (each.engine_routes, None)) if routes == "R3" else LIVE
    seen: dict[int, torch.Tensor] = {}
    at_hand: list[MicroBatch] = []

    def count(router, _inputs, output):
        if torch.is_grad_enabled():
            real = at_hand[-1].layout.is_real[at_hand[-1].layout.sequence_parallel_slice]
            seen[router.layer_number] = seen.get(router.layer_number, 0) + output[1][real].sum(dim=0)

    if not layout:
        policy.on_progress = lambda: at_hand.append(batches[len(at_hand)])
        for layer in hf_weights.unwrap(policy.chunks[0]).decoder.layers:
            if hasattr(layer.mlp, "router"):
                layer.mlp.router.register_forward_hook(count)
    policy.log_probs(batches)  # is nobody's load
    at_hand.clear()
    result = policy.update(batches, weighted_loss, routes=use)
    return {
        "stage": stage_load([result], policy),
        "counts": dict(zip(policy.replay.layer_numbers, result.expert_load.tolist(), strict=True)),
        "seen": {layer: counts.tolist() for layer, counts in seen.items()},
    }


def change_with_a_frozen_router(folder: str, layout: dict[str, Any], store: str) -> dict[str, float] | None:
    """HF name → largest change of each weight in one update with `freeze_moe_router` (on rank 0)."""
    policy = build(folder, layout | {"freeze_moe_router": True}, store)
    before = weights(policy)
    policy.update(micro_batches(policy, ragged_batch()), weighted_loss)
    return {name: float((tensor - before[name]).abs().max()) for name, tensor in weights(policy).items()} or None


def nothing(log_probs: torch.Tensor, entropies: torch.Tensor, micro_batch: MicroBatch):
    """An objective without a gradient."""
    return (log_probs * 0.0).sum(), None


def router_losses(folder: str, layout: dict[str, Any], store: str, count: int) -> dict[str, Any]:
    """Gradients and metrics of the routers' losses alone, over this rank's share in `count` micro-batches."""
    policy = build(folder, layout, store)
    batches = micro_batches(policy, ragged_batch(), count)
    if policy.needs_choices:
        policy.count_choices(batches)
    taken: dict[str, torch.Tensor] = {}

    def look(_: list[Any]) -> bool:
        named = policy.exporter.stream(lambda parameter: parameter.main_grad)
        taken.update({name: tensor.clone() for name, tensor in named})
        return False

    with unittest.mock.patch.object(
        policy, "compute_gradients", functools.partial(policy.compute_gradients, everywhere=True)
    ):
        result = policy.update(batches, nothing, before_step=look)
    return {"gradients": taken, "stage": stage_losses([result], policy)}
