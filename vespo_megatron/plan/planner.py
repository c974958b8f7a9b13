"""`vespo-megatron plan RECIPE --gpu …`: does it fit, how long does a step take, and what would fit instead."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from vespo_megatron.families.shape import ModelShape
from vespo_megatron.megatron.hardware import GPU, TRAINING_MFU
from vespo_megatron.plan.memory import TrainerMemory, parameters, trainer_memory, weight_copies
from vespo_megatron.plan.phases import PhaseMemory, phases, table
from vespo_megatron.plan.timing import (
    Lengths,
    Server,
    fits,
    generation_seconds,
    kv_bytes_per_token,
    server_speed,
    sync_seconds,
    training_seconds,
)
from vespo_megatron.recipe.schema import Recipe

GIB = 2**30
_LAYOUT = {
    "tensor_model_parallel_size": "TP",
    "pipeline_model_parallel_size": "PP",
    "context_parallel_size": "CP",
    "expert_model_parallel_size": "EP",
    "expert_tensor_parallel_size": "ETP",
}


@dataclass(frozen=True)
class Plan:
    """One layout on one device."""

    recipe: Recipe
    device: GPU
    memory: TrainerMemory
    server: Server
    servers: int
    generate: float
    train: float
    sync: float
    phases: list[PhaseMemory]
    """Of a colocated run; else none."""

    @property
    def fits(self) -> bool:
        turns = all(phase.fits(self.device) for phase in self.phases)
        return fits(self.memory.device, self.device) and self.server.slots > 0 and turns

    @property
    def step(self) -> float:
        """Seconds; where rollouts and training overlap, the slower of the two."""
        if self.recipe.grpo.async_grpo.enabled:
            return max(self.generate, self.train) + self.sync / self.recipe.grpo.async_grpo.sync_every
        return self.generate + self.train + self.sync

    @property
    def layout(self) -> str:
        return layout_name(self.recipe)


def plan(shape: ModelShape, recipe: Recipe, device: GPU, lengths: Lengths, mfu: float = TRAINING_MFU) -> Plan:
    """Memory and time of the recipe as it is."""
    server = server_speed(shape, recipe, device, lengths)
    servers, memory = number_of_servers(recipe), trainer_memory(shape, recipe)
    return Plan(
        recipe=recipe,
        device=device,
        memory=memory,
        server=server,
        servers=servers,
        generate=generation_seconds(server, servers, recipe.rollout_batch_size, lengths),
        train=training_seconds(shape, recipe, device, lengths, mfu),
        sync=sync_seconds(shape, recipe, device),
        phases=phases(shape, recipe, device, memory),
    )


def number_of_servers(recipe: Recipe) -> int:
    """Over all rollout nodes; colocated, as many as the trainer's devices hold."""
    config = recipe.policy.generation.sglang_cfg
    if config.urls:
        return len(config.urls)
    if recipe.slurm.rollout_nodes and recipe.slurm.layout != "colocated":
        return recipe.slurm.rollout_nodes * config.num_servers
    if config.colocated:
        return max(1, recipe.world_size // config.tensor_parallel_size)
    return config.num_servers


def layout_name(recipe: Recipe) -> str:
    """As in TP2 EP8 DP16."""
    megatron = recipe.policy.megatron_cfg
    parts = [f"{short}{getattr(megatron, key)}" for key, short in _LAYOUT.items() if getattr(megatron, key) > 1]
    parts.append(f"DP{recipe.data_parallel_size}")
    parts.append("recompute" if megatron.recompute == "full" else "no recompute")
    if megatron.optimizer.optimizer_cpu_offload:
        parts.append("offload")
    return " ".join(parts)


def alternatives(shape: ModelShape, recipe: Recipe) -> Iterator[Recipe]:
    """Other layouts of as many processes that the model can be split by, those nearest to the recipe's first."""
    world, mine = recipe.world_size, recipe.policy.megatron_cfg
    found = []
    for tp, pp, cp, ep in itertools.product((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8, 16, 32)):
        if world % (tp * pp * cp) or world % (ep * pp) or shape.num_hidden_layers % pp:
            continue
        if shape.num_experts % ep or (ep > 1 and not shape.num_moe_layers):
            continue
        if shape.num_attention_heads % tp or (shape.num_key_value_heads % tp and tp % shape.num_key_value_heads):
            continue
        can_offload = recipe.policy.precision == "bfloat16" and mine.optimizer.use_distributed_optimizer
        for full, offload in itertools.product((False, True), (False, True) if can_offload else (False,)):
            megatron = mine.with_values(
                {
                    "tensor_model_parallel_size": tp,
                    "sequence_parallel": tp > 1,
                    "pipeline_model_parallel_size": pp,
                    "context_parallel_size": cp,
                    "expert_model_parallel_size": ep,
                    "expert_tensor_parallel_size": 1,
                    "num_layers_in_first_pipeline_stage": None,
                    "num_layers_in_last_pipeline_stage": None,
                    "activation_checkpointing": full,
                    "recompute_granularity": None,
                    "optimizer.optimizer_cpu_offload": offload,
                    "optimizer.optimizer_offload_fraction": 1.0 if offload else 0.0,
                }
            )
            other = recipe.with_values({"policy.megatron_cfg": megatron})
            if other.policy.train_global_batch_size % other.data_parallel_size:
                continue
            changed = sum(
                getattr(megatron, key) != getattr(mine, key) for key in (*_LAYOUT, "activation_checkpointing")
            ) + (offload != mine.optimizer.optimizer_cpu_offload)
            if changed:
                found.append((changed, tp * pp * cp, offload, full, layout_name(other), other))
    found.sort(key=lambda item: item[:5])
    yield from (item[-1] for item in found)


def report(shape: ModelShape, first: Plan, lengths: Lengths, *, mfu: float = TRAINING_MFU, compare: int = 0) -> str:
    """The plan as text: memory, time, what does not fit, the nearest layout that does, and a table of others."""
    recipe, memory, device = first.recipe, first.memory, first.device
    count = parameters(shape)
    lines = [
        f"{count.total / 1e9:.1f}B parameters, {count.expert / 1e9:.1f}B of them in experts; "
        f"{recipe.world_size} {device.name} train as {first.layout}; "
        f"{first.servers} servers of TP{recipe.policy.generation.sglang_cfg.tensor_parallel_size}",
        f"lengths: {lengths.prompt:.0f} prompt and {lengths.response:.0f} response tokens on average; "
        f"assumed: {mfu:.0%} MFU in training",
        "",
        f"trainer process, GiB of {device.memory_gib:g}:",
    ]
    parts = ("weights", "gradients", "optimizer", "activations", "logits", "routes")
    lines += [f"  {name:12}{getattr(memory, name) / GIB:8.2f}" for name in parts]
    lines.append(
        f"  {'together':12}{memory.device / GIB:8.2f}" + ("" if fits(memory.device, device) else "   too much")
    )
    if memory.host:
        lines.append(f"  {'on the host':12}{memory.host / GIB:8.2f}")
    if memory.weight_copies:
        per_node = recipe.cluster.gpus_per_node * memory.weight_copies
        lines.append(
            f"  {'on the host':12}{memory.weight_copies / GIB:8.2f}   {weight_copies(recipe)} copies of the weights, "
            f"{per_node / GIB:.0f} GiB a node"
        )
    if first.phases:
        lines += table(first.phases, recipe, device, memory)
    per_token = kv_bytes_per_token(shape)
    lines += [
        f"server: {per_token / 1024:.0f} KiB of keys and values a token, room for {first.server.slots} sequences at a "
        "time" + ("" if first.server.slots else ": the weights alone do not fit"),
        "",
        f"step: {first.step:.0f} s = generate {first.generate:.0f} s, train {first.train:.0f} s "
        f"({recipe.num_mini_batches} updates), weights {first.sync:.1f} s"
        + (", generation beside training" if recipe.grpo.async_grpo.enabled else ""),
        f"run: {recipe.grpo.max_num_steps} steps, {recipe.grpo.max_num_steps * first.step / 3600:.0f} hours",
    ]
    others = [plan(shape, other, device, lengths, mfu) for other in alternatives(shape, recipe)]
    fitting = [other for other in others if other.fits]
    if not first.fits:
        lines += ["", "does not fit."]
        if fitting:
            lines.append(f"nearest layout that does: {fitting[0].layout}")
        elif first.server.slots == 0:
            lines.append("the server needs more GPUs: policy.generation.sglang_cfg.tensor_parallel_size")
        elif any(phase.server and not phase.fits(device) for phase in first.phases):
            lines.append("lower policy.generation.sglang_cfg.mem_fraction_static")
        else:
            lines.append(f"no layout of {recipe.world_size} {device.name} does: use more of them, or shorter sequences")
    if compare:
        # Times are of FLOPs alone, so many are equal: then whatever exchanges least between devices comes first.
        best = sorted(fitting, key=lambda other: (round(other.step), other.recipe.model_parallel_size))[:compare]
        lines += ["", f"{'layout':44}{'GiB':>8}{'train s':>10}{'step s':>9}"]
        for other in [first, *best]:
            mark = "" if other.fits else "  does not fit"
            lines.append(f"{other.layout:44}{other.memory.device / GIB:8.1f}{other.train:10.0f}{other.step:9.0f}{mark}")
    return "\n".join(lines)
