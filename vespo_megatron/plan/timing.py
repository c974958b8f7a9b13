"""Seconds of a step from FLOPs and bandwidths. What it assumes is in `hardware`, and shown with the plan."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vespo_megatron.families.shape import ModelShape
from vespo_megatron.megatron import flops
from vespo_megatron.megatron.hardware import DECODE_BANDWIDTH, GPU, TRAINING_MFU, USABLE_MEMORY
from vespo_megatron.plan.activations import element_size
from vespo_megatron.plan.memory import parameters
from vespo_megatron.recipe.schema import Recipe


@dataclass(frozen=True)
class Lengths:
    """Tokens of a prompt and of a response, on average."""

    prompt: float
    response: float


def default_lengths(recipe: Recipe) -> Lengths:
    """Half of what the recipe allows; say what your data does with `--prompt-tokens` and `--response-tokens`."""
    return Lengths(recipe.data.max_input_seq_length / 2, recipe.policy.generation.max_new_tokens / 2)


@dataclass(frozen=True)
class Server:
    """What a rollout server does: the seconds of one decoding step for so many running sequences."""

    base: float
    """Reading the weights, once per step."""
    per_sequence: float
    """Reading one sequence's keys and values, and its own arithmetic."""
    slots: int
    """Sequences whose keys and values fit at a time."""
    prefill_tokens_per_second: float

    def step(self, running: int) -> float:
        """Seconds in which each of `running` sequences gains a token."""
        return self.base + self.per_sequence * running


def server_speed(shape: ModelShape, recipe: Recipe, device: GPU, lengths: Lengths) -> Server:
    """Decoding is bound by memory bandwidth: with many sequences every expert is read each step."""
    config = recipe.policy.generation.sglang_cfg
    tp = config.tensor_parallel_size
    element = element_size(recipe)
    bandwidth = tp * device.memory_tb * 1e12 * DECODE_BANDWIDTH
    weights = parameters(shape).total * element
    per_token = kv_bytes_per_token(shape, element)
    room = tp * device.memory_gib * 2**30 * (config.mem_fraction_static or 0.85) - weights
    longest = lengths.prompt + lengths.response
    compute = flops.per_token(shape) + flops.output_layer(shape)
    rate = tp * device.bf16_tflops * 1e12 * 0.4
    return Server(
        base=weights / bandwidth,
        per_sequence=per_token * (lengths.prompt + lengths.response / 2) / bandwidth + compute / rate,
        slots=max(0, min(config.max_concurrent_requests, int(room / (per_token * longest)))),
        prefill_tokens_per_second=rate / flops.per_token(shape),
    )


def kv_bytes_per_token(shape: ModelShape, element: int = 2) -> int:
    """Keys and values of one token in every layer."""
    return shape.kv_values_per_token * element


def generation_seconds(server: Server, servers: int, responses: int, lengths: Lengths) -> float:
    """Of a batch, all servers together; the long tail of response lengths comes on top (`simulate` has it)."""
    if server.slots == 0 or servers == 0:
        return math.inf
    each = math.ceil(responses / servers)
    waves, running = math.ceil(each / server.slots), min(each, server.slots)
    prefill = responses * lengths.prompt / (servers * server.prefill_tokens_per_second)
    return waves * lengths.response * server.step(running) + prefill


def training_seconds(
    shape: ModelShape, recipe: Recipe, device: GPU, lengths: Lengths, mfu: float = TRAINING_MFU
) -> float:
    """Of one step: every update of the rollout batch, and the passes before them.

    Those for π_old are at most one per weight version that may be in a batch.
    """
    responses = recipe.rollout_batch_size
    length = int(lengths.prompt + lengths.response)
    work = flops.training(shape, [length], int(lengths.response)) * responses
    forward = work // 3
    work += forward if recipe.policy.megatron_cfg.recompute == "full" else 0
    if recipe.behavior != "rollout" or recipe.policy.router_replay.mode == "R2":
        work += forward * max(1, recipe.held_versions)
    if recipe.loss_fn.router_shift.apply != "none" and recipe.policy.megatron_cfg.pipeline_model_parallel_size > 1:
        work += forward  # which measures the routers before the losses
    bubble = pipeline_bubble(recipe)
    return work / (recipe.world_size * device.bf16_tflops * 1e12 * mfu) / (1 - bubble)


def pipeline_bubble(recipe: Recipe) -> float:
    """Share of the time in which a pipeline stage waits (1F1B): (p − 1)/(p − 1 + m)."""
    megatron, policy = recipe.policy.megatron_cfg, recipe.policy
    stages = megatron.pipeline_model_parallel_size
    if stages == 1:
        return 0.0
    per_rank = policy.train_global_batch_size / recipe.data_parallel_size
    tokens = policy.sequence_packing.train_mb_tokens if policy.sequence_packing.enabled else 0
    packed = max(1, tokens // policy.max_total_sequence_length) if tokens else policy.train_micro_batch_size
    micro_batches = max(1, math.ceil(per_rank / packed))
    return (stages - 1) / (stages - 1 + micro_batches)


def sync_seconds(shape: ModelShape, recipe: Recipe, device: GPU) -> float:
    """Weights to every server: one broadcast over the network."""
    element = element_size(recipe)
    return parameters(shape).total * element / (device.network_gb * 1e9 * 0.7)


def fits(bytes_needed: int, device: GPU) -> bool:
    """Whether a process with so much to hold lives on this device."""
    return bytes_needed <= device.memory_gib * 2**30 * USABLE_MEMORY
