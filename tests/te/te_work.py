"""What ranks with the stand-in run: any work of tests/parallel, with layers of a given kind, and what they are made of.

Only their processes can import `transformer_engine`.
"""

from __future__ import annotations

import contextlib
import unittest.mock
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from checkpoint_work import save_after_two_updates, state_and_next
from layout_work import build, micro_batches, ragged_batch, weighted_loss

from vespo_megatron.families.shape import ModelShape
from vespo_megatron.megatron import checkpoint, cpu_runtime, hf_weights, model, native

# isort: split
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer.moe import token_dispatcher


@contextlib.contextmanager
def _layers_of(kind: str) -> Iterator[None]:
    """Policies are of `kind`, "te" or "native", on a CPU, where users get native ones alone."""
    # token_dispatcher.py:404: fused permutation keeps its indices on "cuda".
    on_cpu = cpu_runtime._ModuleWith(torch, device=lambda *_: torch.device("cpu"))
    with (
        unittest.mock.patch.object(model, "layers_of", lambda *_: kind),
        unittest.mock.patch.object(token_dispatcher, "torch", on_cpu),
    ):
        yield


def with_layers(store: str, layers: str, work: Callable[..., Any], **kwargs: Any) -> Any:
    """`work(...)` with policies of `layers`."""
    with _layers_of(layers):
        return work(store=store, **kwargs)


def attention_calls(folder: str, layout: dict[str, Any], store: str) -> dict[str, Any]:
    """What attention and rotary embedding were given in one update, and the micro-batches they were to see."""
    from transformer_engine.pytorch import cpp_extensions
    from transformer_engine.pytorch.attention import dot_product_attention, rope

    policy = build(folder, layout, store)
    batches = micro_batches(policy, ragged_batch())
    for calls in (dot_product_attention.calls, rope.calls, cpp_extensions.calls):
        calls.clear()
    with unittest.mock.patch.object(rope_utils, "_apply_rotary_pos_emb_thd", None):  # fetches offsets to the host
        policy.update(batches, weighted_loss)
    return {
        "attention": [dict(call) for call in dot_product_attention.calls],
        "rope": list(rope.calls),
        "products": set(cpp_extensions.calls),
        "cu_seqlens": [torch.from_numpy(each.layout.cu_seqlens) for each in batches],
        "tokens": [each.input_ids.shape[1] for each in batches],
    }


def made_of(folder: str, layout: dict[str, Any], store: str) -> dict[str, Any]:
    """Classes of the modules, marks of the parameters and the hooks of a policy's first model chunk."""
    policy = build(folder, layout, store)
    chunk = hf_weights.unwrap(policy.chunks[0])
    marks = ("allreduce", "sequence_parallel", "tensor_model_parallel", "partition_dim")
    return {
        "classes": {name: type(module).__name__ for name, module in chunk.named_modules()},
        "marks": {
            name: {mark: getattr(parameter, mark, None) for mark in marks}
            for name, parameter in chunk.named_parameters()
        },
        "shapes": {name: tuple(parameter.shape) for name, parameter in chunk.named_parameters()},
        "hooked": [
            router.router_replay is hook
            for router, hook in zip(policy.replay.routers, policy.replay.hooks, strict=True)
        ],
        "layers": policy.replay.layer_numbers,
        "expert_buffers": sum(len(wrapped.expert_parallel_buffers) for wrapped in policy.chunks),
        "optimizer": type(policy.optimizer.chained_optimizers[0].optimizer).__name__,
        "tracker": type(tensor_parallel.get_cuda_rng_tracker()).__module__,
    }


def in_16_bits(folder: str, layout: dict[str, Any], store: str, precision: str) -> tuple[list[torch.Tensor], float]:
    """Log-probs of a policy in such a precision, and the norm of its gradients."""
    policy = build(folder, layout, store, precision=precision)
    batches = micro_batches(policy, ragged_batch())
    return policy.log_probs(batches), policy.update(batches, weighted_loss).grad_norm


def checkpoint_keys(folder: str, layout: dict[str, Any], store: str) -> dict[str, tuple[int, ...]]:
    """Key and global shape of every tensor of the policy's state in a checkpoint."""
    policy = build(folder, layout, store)
    policy.update(micro_batches(policy, ragged_batch()), weighted_loss)
    state = checkpoint._state(policy, is_loading=False)
    apply_factories(state)
    tensors = [tensor for tensor in nested_values(state) if isinstance(tensor, ShardedTensor)]
    assert not [value for value in nested_values(state) if "_extra_state" in getattr(value, "key", "")]
    return {tensor.key: tuple(tensor.global_shape) for tensor in tensors}


def save_at_once(folder: str, layout: dict[str, Any], store: str, target: str) -> dict[str, Any]:
    """A checkpoint of a policy that has taken no update, and its first one."""
    policy = build(folder, layout, store)
    checkpoint.save(policy, Path(target))()
    return state_and_next(policy, micro_batches(policy, ragged_batch()))


def save_as_before(folder: str, layout: dict[str, Any], store: str, target: str) -> Any:
    """`save_after_two_updates` with the keys that native layers had in version 0.1."""
    current = native.spec.native_layer_spec

    def former(config: Any, shape: ModelShape, *, is_moe: bool) -> Any:
        spec = current(config, shape, is_moe=is_moe)
        spec.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
        return spec

    with (
        unittest.mock.patch.object(native.spec, "native_layer_spec", former),
        unittest.mock.patch.object(checkpoint, "is_extra_state", lambda _: False),
    ):
        return save_after_two_updates(folder, layout, store, target)


def save_weights(folder: str, layout: dict[str, Any], store: str, target: str) -> None:
    """The weights of a policy as a distributed checkpoint."""
    policy = build(folder, layout, store)
    checkpoint.save_weights(policy.chunks, Path(target))()
