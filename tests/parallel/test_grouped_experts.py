"""The grouped experts against float64 formulas, megatron-core's `SequentialMLP`, and its checkpoint format."""

from __future__ import annotations

import multiprocessing
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F

from vespo_megatron.megatron import parallel
from vespo_megatron.megatron.native import experts as grouped
from vespo_megatron.recipe.schema import MegatronConfig


def looped(x, probs, fc1, fc2, tokens_per_expert):
    """The definition, one expert after the other."""
    parts, start = [], 0
    for expert, count in enumerate(tokens_per_expert.tolist()):
        rows = slice(start, start := start + count)
        gate, up = (x[rows] @ fc1[expert].t()).chunk(2, dim=1)
        parts.append((F.silu(gate) * up * probs[rows, None]) @ fc2[expert].t())
    return torch.cat(parts)


def test_value_and_gradients_are_those_of_the_definition():
    torch.manual_seed(0)
    counts = torch.tensor([3, 0, 5, 1])
    leaves = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((9, 6), (9,), (4, 10, 6), (4, 6, 5))
    ]
    weight = torch.randn(9, 6, dtype=torch.float64)
    expected = torch.autograd.grad((looped(*leaves, counts) * weight).sum(), leaves)
    found = torch.autograd.grad((grouped._GroupedSwiGLU.apply(*leaves, counts) * weight).sum(), leaves)
    assert torch.autograd.gradcheck(lambda *given: grouped._GroupedSwiGLU.apply(*given, counts), leaves)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_main_grad_takes_the_sum_of_two_backwards():
    torch.manual_seed(0)
    counts = torch.tensor([2, 4])
    x, probs, fc1, fc2 = torch.randn(6, 4), torch.rand(6), torch.randn(2, 6, 4), torch.randn(2, 4, 3)
    fc1.requires_grad_(), fc2.requires_grad_()
    once = torch.autograd.grad(looped(x, probs, fc1, fc2, counts).sum(), (fc1, fc2))
    for weight in (fc1, fc2):
        weight.main_grad = torch.zeros_like(weight)
    for _ in range(2):
        grouped._GroupedSwiGLU.apply(x, probs, fc1, fc2, counts).sum().backward()
    for weight, gradient in zip((fc1, fc2), once, strict=True):
        assert weight.grad_added_to_main_grad
        torch.testing.assert_close(weight.main_grad, 2 * gradient)


# ---- checkpoints: written in one layout, read in another and by SequentialMLP --------------------------------------


def _build(layout: dict, store: str, kind: str):
    from types import SimpleNamespace

    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP

    rank_info = parallel.initialize(MegatronConfig(**layout), seed=1, device=torch.device("cpu"), init_method=store)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        ffn_hidden_size=16,
        moe_ffn_hidden_size=12,
        num_moe_experts=4,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        **{name: size for name, size in layout.items() if name != "sequence_parallel"},
        sequence_parallel=layout.get("sequence_parallel", False),
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    count = 4 // rank_info.expert_size
    if kind == "grouped":
        return rank_info, grouped.GroupedExperts(count, config, groups)
    linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return rank_info, SimpleNamespace(m=SequentialMLP(count, config, linear, groups)).m


def _fill(module, rank_info) -> None:
    """Every number says which expert, row and column it is, so that a misplaced slice shows."""
    full1 = torch.arange(4 * 24 * 8.0).view(4, 24, 8)
    full2 = -torch.arange(4 * 8 * 12.0).view(4, 8, 12)
    here = slice(
        rank_info.expert_rank * (4 // rank_info.expert_size), (rank_info.expert_rank + 1) * (4 // rank_info.expert_size)
    )
    rank, size = rank_info.expert_tensor_rank, rank_info.expert_tensor_size
    fc1 = torch.cat([half.chunk(size, dim=1)[rank] for half in full1[here].chunk(2, dim=1)], dim=1)
    fc2 = full2[here].chunk(size, dim=2)[rank]
    return fc1, fc2


def _weights(module) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(module, grouped.GroupedExperts):
        return module.linear_fc1_weight.data, module.linear_fc2_weight.data
    return tuple(
        torch.stack([getattr(expert, name).weight.data for expert in module.local_experts])
        for name in ("linear_fc1", "linear_fc2")
    )


def write(store: str, layout: dict, folder: str) -> None:
    from megatron.core import dist_checkpointing

    rank_info, module = _build(layout, store, "grouped")
    for weight, value in zip(_weights(module), _fill(module, rank_info), strict=True):
        weight.copy_(value)
    if rank_info.rank == 0:
        os.makedirs(folder)
    dist.barrier()
    multiprocessing.current_process()._config["daemon"] = False  # dist_checkpointing starts a process of its own
    try:
        dist_checkpointing.save(module.sharded_state_dict(prefix="mlp.experts."), folder)
    finally:
        multiprocessing.current_process()._config["daemon"] = True


def read(store: str, layout: dict, folder: str, kind: str) -> float:
    from megatron.core import dist_checkpointing

    rank_info, module = _build(layout, store, kind)
    wanted = module.sharded_state_dict(prefix="mlp.experts.")
    wanted = {name: value for name, value in wanted.items() if "_extra_state" not in name}
    state = dist_checkpointing.load(wanted, folder)
    if kind == "grouped":
        loaded = (state["mlp.experts.linear_fc1_weight"], state["mlp.experts.linear_fc2_weight"])
    else:
        loaded = tuple(
            torch.stack(
                [state[f"mlp.experts.local_experts.{i}.{name}.weight"] for i in range(4 // rank_info.expert_size)]
            )
            for name in ("linear_fc1", "linear_fc2")
        )
    return max(
        float((found - value).abs().max()) for found, value in zip(loaded, _fill(module, rank_info), strict=True)
    )


EP2 = {"expert_model_parallel_size": 2}
ETP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_tensor_parallel_size": 2}


def test_a_checkpoint_of_one_layout_is_read_in_every_other(workers, tmp_path):
    for number, (size, layout) in enumerate([(2, EP2), (2, ETP2), (1, {})]):
        folder = str(tmp_path / str(number))
        workers.run(write, size, layout=layout, folder=folder)
        for other_size, other, kind in [
            (1, {}, "grouped"),
            (2, EP2, "grouped"),
            (2, ETP2, "grouped"),
            (2, EP2, "loop"),
        ]:
            errors = workers.run(read, other_size, layout=other, folder=folder, kind=kind)
            assert max(errors) == 0.0, (layout, other, kind)
