"""Plugin inside SGLang: which part of every Hugging Face tensor a rank's live parameters hold, and its checksum.

Why not SGLang's own `/weights_checker {"action": "checksum"}`: 0.5.23 hashes *its* parameters (query, key and value
fused, all experts of a layer in one tensor, a tensor-parallel shard of each) with SHA-256 on CPU and a Triton hash
on CUDA. A trainer that streams single tensors would have to hold whole layers back to rebuild those, and run the
same GPU kernel. So this plugin (entry-point group `sglang.srt.plugins`, loaded by SGLang in every scheduler) adds
three actions to the same endpoint (`actions`). Checksums are read out of the *live* parameters that the next forward
pass uses, un-fused. Of files it sees only names that the trainer makes up for that, `vespo-<random>.probe`: for
transports that share memory or a filesystem.

The trainer hashes the same slices of what it streams (`weight_sync`). The two agree only if names, fusion, sharding,
dtype, transport and loading were all right: nothing is assumed about how the bytes got there.

Only SGLang's processes import this module.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vespo_megatron.families.family import family_of
from vespo_megatron.families.shape import TensorNames
from vespo_megatron.rollout_sglang.checksum import WeightChecksum, tensor_checksum
from vespo_megatron.rollout_sglang.plugin.actions import CHECKSUM, ERROR_KEY, MANIFEST, SEES

_PROBE = re.compile(r"vespo-[0-9a-f]{32}\.probe")


@dataclass(frozen=True)
class HeldSlice:
    """A view into a live parameter and where it lies in the Hugging Face tensor of that name."""

    name: str
    view: torch.Tensor
    ranges: tuple[tuple[int, int], ...]
    """One `(start, stop)` per dimension of the whole tensor."""

    def describe(self) -> str:
        """`"float32 0:64,0:32"`"""
        dtype = str(self.view.dtype).removeprefix("torch.")
        return f"{dtype} " + ",".join(f"{start}:{stop}" for start, stop in self.ranges)


def register() -> None:
    """SGLang calls this in each of its processes (`sglang.srt.plugins.load_plugins`)."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.utils.weight_checker.WeightChecker.handle", _handle, HookType.AROUND)


def _handle(original: Callable[..., Any], checker: Any, action: str, *args: Any, **kwargs: Any) -> Any:
    if action.partition(" ")[0] not in (MANIFEST, CHECKSUM, SEES):
        return original(checker, action, *args, **kwargs)
    try:
        values, digest = _answer(action, checker._get_model())
    except Exception as error:  # raised, it would leave the other ranks waiting in SGLang's gather of the answers
        values, digest = {ERROR_KEY: f"{type(error).__name__}: {error}"}, ""
    info = checker._parallelism_info(role=kwargs["role"]).model_dump()
    return {"checksums": values, "per_gpu_checksum": digest, "parallelism_info": info}


def _answer(action: str, model: torch.nn.Module) -> tuple[dict[str, str], str]:
    """The values by Hugging Face name, and their digest."""
    kind, _, argument = action.partition(" ")
    if kind == SEES:
        path = Path(argument)
        return {"sees": "yes" if _PROBE.fullmatch(path.name) and path.exists() else "no"}, ""
    values: dict[str, str] = {}
    total = WeightChecksum()
    for held in held_slices(model):
        if kind == MANIFEST:
            values[held.name] = held.describe()
        else:
            checksum = tensor_checksum(held.name, held.view)
            total.add_checksum(checksum)
            values[held.name] = f"{checksum:016x}"
    return values, total.hexdigest()


def held_slices(model: torch.nn.Module) -> Iterator[HeldSlice]:
    """Every Hugging Face tensor (or part of one) in an SGLang model, each parameter accounted for.

    Raises `NotImplementedError` for a parameter or a memory layout it does not know: no checksum is better than one
    that leaves something out.
    """
    known: set[int] = set()
    names: TensorNames | None = None
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own or all(id(parameter) in known for parameter in own.values()):
            continue
        known.update(id(parameter) for parameter in own.values())
        if "FusedMoE" in {base.__name__ for base in type(module).__mro__}:
            names = names or _tensor_names(model)
            yield from _expert_slices(name, module, own, names)
        else:
            yield from _module_slices(name, module, own)
    missing = [name for name, parameter in model.named_parameters() if id(parameter) not in known]
    if missing:
        raise NotImplementedError(f"parameters that no module holds: {missing[:3]}")


def _module_slices(name: str, module: Any, own: dict[str, torch.nn.Parameter]) -> Iterator[HeldSlice]:
    kind = {base.__name__ for base in type(module).__mro__}
    if "QKVParallelLinear" in kind:
        yield from _qkv_slices(name, module, own)
    elif "MergedColumnParallelLinear" in kind:
        yield from _gate_up_slices(name, module, own)
    elif "RowParallelLinear" in kind:
        rank, _ = _rank_and_size(module.tp_group)
        for key, parameter in own.items():
            columns = parameter.shape[1] if parameter.dim() == 2 else 0
            held = [(0, parameter.shape[0])] + ([(rank * columns, (rank + 1) * columns)] if columns else [])
            yield HeldSlice(f"{name}.{key}", parameter.data, tuple(held))
    elif "VocabParallelEmbedding" in kind:
        shard = module.shard_indices
        start, stop = shard.org_vocab_start_index, shard.org_vocab_end_index
        for key, parameter in own.items():
            ranges = ((start, stop), *((0, size) for size in parameter.shape[1:]))
            yield HeldSlice(f"{name}.{key}", parameter.data[: stop - start], ranges)
    elif "ReplicatedLinear" in kind or any(base.endswith("RMSNorm") for base in kind) or own.keys() == _BIASED_ROUTER:
        for key, parameter in own.items():
            yield HeldSlice(f"{name}.{key}", parameter.data, tuple((0, size) for size in parameter.shape))
    else:
        raise NotImplementedError(f"{name}: no checksum for a {type(module).__name__} with {sorted(own)}")


_BIASED_ROUTER = {"weight", "e_score_correction_bias"}
"""Of a router that is a module of its own, in GLM-4.5 and its kin."""


def _tensor_names(model: Any) -> TensorNames:
    model_type = model.config.model_type
    if (family := family_of(model_type)) is None:
        raise NotImplementedError(f"no names for the experts of a {model_type}")
    return family.names


def _rank_and_size(group: Any) -> tuple[int, int]:
    return (0, 1) if group is None else (group.rank_in_group, group.world_size)


def _stacked(prefix: str, key: str, parameter: torch.Tensor, parts: list[tuple[str, int, int]]) -> Iterator[HeldSlice]:
    """Parts stacked in dimension 0, as (Hugging Face module, rows here, index of this shard)."""
    offset = 0
    for part, rows, shard in parts:
        ranges = ((shard * rows, (shard + 1) * rows), *((0, size) for size in parameter.shape[1:]))
        yield HeldSlice(f"{prefix}.{part}.{key}", parameter.data[offset : offset + rows], ranges)
        offset += rows
    if offset != parameter.shape[0]:
        raise NotImplementedError(f"{prefix}: {parameter.shape[0]} rows, of which {offset} are accounted for")


def _qkv_slices(name: str, module: Any, own: dict[str, torch.nn.Parameter]) -> Iterator[HeldSlice]:
    rank, _ = _rank_and_size(module.tp_group)
    kv_rank = _rank_and_size(module.kv_tp_group)[0] // module.num_kv_head_replicas
    parts = [
        ("q_proj", module.num_heads * module.head_size, rank),
        ("k_proj", module.num_kv_heads * module.head_size, kv_rank),
        ("v_proj", module.num_kv_heads * module.v_head_size, kv_rank),
    ]
    for key, parameter in own.items():
        yield from _stacked(name.rpartition(".")[0], key, parameter, parts)


def _gate_up_slices(name: str, module: Any, own: dict[str, torch.nn.Parameter]) -> Iterator[HeldSlice]:
    if not name.endswith("gate_up_proj"):
        raise NotImplementedError(f"{name}: only gate_up_proj is known as a merged linear")
    rank, size = _rank_and_size(module.tp_group)
    gate, up = (rows // size for rows in module.output_sizes)
    for key, parameter in own.items():
        parts = [("gate_proj", gate, rank), ("up_proj", up, rank)]
        yield from _stacked(name.rpartition(".")[0], key, parameter, parts)


def _expert_slices(
    name: str, module: Any, own: dict[str, torch.nn.Parameter], names: TensorNames
) -> Iterator[HeldSlice]:
    """`w13_weight` [experts, gate above up, hidden] and `w2_weight` [experts, hidden, intermediate]."""
    method = module.quant_method
    permuted = [
        flag
        for flag in ("load_up_proj_weight_first", "w13_swiglu_interleaved", "use_triton_kernels")
        if getattr(method, flag, False)
    ]
    if getattr(method, "use_flashinfer_trtllm_moe", False):
        permuted.append("use_flashinfer_trtllm_moe")
    if set(own) != {"w13_weight", "w2_weight"} or permuted:
        raise NotImplementedError(
            f"{name}: no checksum for {sorted(own)} laid out for {permuted or type(method).__name__}; "
            "start the server with --moe-runner-backend triton"
        )
    w13, w2 = own["w13_weight"].data, own["w2_weight"].data
    rows, hidden = w13.shape[1] // 2, w13.shape[2]
    ranges = (module.moe_tp_rank * rows, (module.moe_tp_rank + 1) * rows)
    first = module.moe_ep_rank * module.num_local_experts
    for local in range(module.num_local_experts):
        prefix = f"{name}.{first + local}"
        yield HeldSlice(f"{prefix}.{names.gate}", w13[local, :rows], (ranges, (0, hidden)))
        yield HeldSlice(f"{prefix}.{names.up}", w13[local, rows:], (ranges, (0, hidden)))
        yield HeldSlice(f"{prefix}.{names.down}", w2[local], ((0, hidden), ranges))
