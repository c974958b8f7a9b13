"""CPU runtime of megatron-core: stand-ins for CUDA, the only file that knows what a machine lacks.

megatron-core 0.16.1 asks for CUDA by name in a few dozen places. Each stand-in below names the upstream lines it
answers. Nothing is touched where CUDA is present. Two kinds of stand-in are needed:

* functions of `torch.cuda` that would raise: replaced in `torch.cuda` itself, since nothing else could use them;
* `device="cuda"` and `pin_memory=True` written out in calls: the modules that do so get a proxy for their global
  `torch` that changes those two keywords, and whose all-reduce does nothing in a group of one. A `TorchFunctionMode`
  would do it too, at a cost in every operation of the model; the proxies cost nothing outside those modules.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

_MODULES_THAT_NAME_CUDA = (
    "optimizer.clip_grads",  # 90, 103, 115, 174, 207: norms and overflow buffers
    "optimizer.grad_scaler",  # 15, 88-94
    "optimizer.optimizer",  # 473-485, 907
    "optimizer.cpu_offloading.hybrid_optimizer",  # 110: pin_memory=True
    "pipeline_parallel.schedules",  # 596, 983, 2138: total_num_tokens
    "transformer.moe.moe_utils",  # 998: aux-loss tracker
    "models.common.embeddings.rope_utils",  # 63: pin_memory=True, .cuda()
    "distributed.param_and_grad_buffer",  # 768
    "tensor_parallel.data",  # 37
    "utils",  # 1207: local_multi_tensor_l2_norm
    "dist_checkpointing.strategies.state_dict_saver",  # 204
)
_CREATION_FUNCTIONS = ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like", "ones_like")
_installed = False


def install() -> None:
    """Install every stand-in once; does nothing where CUDA is present. Call it before importing megatron-core."""
    global _installed
    # Counting GPUs asks the driver's library alone: a process that has imported this may fork children that use CUDA.
    if _installed or torch.cuda.device_count() > 0:
        return
    _installed = True
    _import_without_compiling()
    _stand_in_for_cuda_functions()
    torch_on_cpu = _torch_on_cpu()
    for name in _MODULES_THAT_NAME_CUDA:
        module = importlib.import_module(f"megatron.core.{name}")
        module.torch = torch_on_cpu  # type: ignore[attr-defined]
    _send_nothing_to_oneself()
    _exchange_pieces_of_any_length()
    _stand_in_for_rng_state()
    _stand_in_for_host_copies()
    _accept_cpu_tensor_types()
    _offload_to_the_same_memory()


def installed() -> bool:
    """Whether they are: megatron-core then computes on the CPU, and on a GPU otherwise."""
    return _installed


class _NoStream:
    """A CUDA stream or event where everything is already in order."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _NoStream)

    def __hash__(self) -> int:
        return 0

    def wait_stream(self, _stream: Any) -> None: ...

    def wait_event(self, _event: Any) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def record_event(self, _event: Any = None) -> _NoStream:
        return self

    def query(self) -> bool:
        return True


def _import_without_compiling() -> None:
    """Let `torch.compile` do nothing while megatron-core is imported.

    jit.py:`enable_jit_fuser` makes every fused helper a compiled one then, which on CPU loads dynamo and later starts a
    C++ compiler.
    """
    compile_function = torch.compile
    torch.compile = lambda function=None, **_kwargs: function  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # six warnings that Apex and Transformer Engine are not installed
            importlib.import_module("megatron.core.jit").disable_jit_fuser()
            for name in (
                *_MODULES_THAT_NAME_CUDA,
                "models.gpt.gpt_layer_specs",
                "optimizer.distrib_optimizer",
                "distributed",
            ):
                importlib.import_module(f"megatron.core.{name}")
    finally:
        torch.compile = compile_function


def _stand_in_for_cuda_functions() -> None:
    """`torch.cuda.current_device()` as a `device=` (mappings.py:91 and 170 more), streams, events, nvtx."""

    def nothing() -> Callable[..., None]:
        # One function object each: dynamo refuses to see the same one under two names.
        return lambda *_args, **_kwargs: None

    stream = _NoStream()
    cuda = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(cuda, name, nothing())
    for name in ("range_push", "range_pop"):
        setattr(cuda.nvtx, name, nothing())
    cuda.Stream = cuda.Event = _NoStream  # type: ignore[misc,assignment]
    cuda.current_stream = lambda *_args: stream  # type: ignore[assignment]
    cuda.default_stream = lambda *_args: stream  # type: ignore[assignment]
    cuda.stream = lambda *_args: contextlib.nullcontext()  # type: ignore[assignment]
    cuda.get_rng_state = lambda *_args: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_args: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)  # type: ignore[assignment]
    torch.Tensor.record_stream = nothing()  # type: ignore[method-assign]
    torch.Tensor.cuda = lambda self, *_args, **_kwargs: self  # type: ignore[method-assign]


class _ModuleWith(types.ModuleType):
    """A module with some of its functions replaced, for those who are given it."""

    def __init__(self, real: types.ModuleType, **replaced: Any) -> None:
        super().__init__(real.__name__)
        self.__dict__.update(replaced, _real=real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)


def _torch_on_cpu() -> _ModuleWith:
    """`torch`, with `device="cuda"` read as the CPU and `pin_memory` dropped in the creation functions."""
    creation = {name: _on_cpu(getattr(torch, name)) for name in _CREATION_FUNCTIONS}
    distributed = _ModuleWith(torch.distributed, all_reduce=_unless_alone(torch.distributed.all_reduce))
    return _ModuleWith(torch, distributed=distributed, **creation)


def _on_cpu(create: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(create)
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return create(*args, **kwargs)

    return wrapper


def _send_nothing_to_oneself() -> None:
    """param_and_grad_buffer.py:285, 443, 455 reduces gradients and gathers parameters over groups of one, too.

    gloo's threads would do that with OpenMP workers of their own, and libgomp, which then counts more workers than
    cores, puts all of them to sleep between operations: a small model's step took twice as long.
    """
    buffers = importlib.import_module("megatron.core.distributed.param_and_grad_buffer")
    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        setattr(buffers, name, _unless_alone(getattr(buffers, name)))


def _unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    """`collective(output, [input], ..., group=...)` that in a group of one is a copy at most."""

    @functools.wraps(collective)
    def wrapper(output: torch.Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
        if torch.distributed.get_world_size(group) > 1:
            return collective(output, *args, group=group, **kwargs)
        for given in args[:1]:
            if given.data_ptr() != output.data_ptr():
                output.copy_(given)
        return None

    return wrapper


def _exchange_pieces_of_any_length() -> None:
    """mappings.py:150 and 192: with ETP ranks exchange as many rows as each has; gloo wants equally many of all."""
    mappings = importlib.import_module("megatron.core.tensor_parallel.mappings")
    distributed = _ModuleWith(torch.distributed, all_gather=_all_gather, reduce_scatter=_reduce_scatter)
    mappings.torch = _ModuleWith(torch, distributed=distributed)  # type: ignore[attr-defined]


def _all_gather(pieces: list[torch.Tensor], own: torch.Tensor, *, group: Any) -> None:
    """Fill `pieces` [rows of that rank, ...] with every rank's `own`."""
    longest = max(map(len, pieces))
    padded = own.new_zeros(longest, *own.shape[1:])
    padded[: len(own)] = own
    everyone = [torch.empty_like(padded) for _ in pieces]
    torch.distributed.all_gather(everyone, padded, group=group)
    for piece, found in zip(pieces, everyone, strict=True):
        piece.copy_(found[: len(piece)])


def _reduce_scatter(output: torch.Tensor, pieces: list[torch.Tensor], *, group: Any) -> None:
    """Fill `output` with the sum of every rank's piece for this one."""
    longest = max(map(len, pieces))
    padded = pieces[0].new_zeros(len(pieces), longest, *output.shape[1:])
    for row, piece in zip(padded, pieces, strict=True):
        row[: len(piece)] = piece
    torch.distributed.all_reduce(padded, group=group)
    output.copy_(padded[group.rank(), : len(output)])


def _stand_in_for_rng_state() -> None:
    """tensor_parallel/random.py:41-106: the model-parallel RNG tracker keeps CUDA states; let it keep CPU states."""
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda new_state, *_args, **_kwargs: torch.set_rng_state(new_state)

    @contextlib.contextmanager
    def fork(self: Any, name: str = random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        # Upstream's fork warns when the CPU state changes inside a GPU context; here it is the state that changes.
        if name not in self.states_:
            raise Exception(f"cuda rng state {name} is not added")
        outside = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outside)

    random.CudaRNGStatesTracker.fork = fork


def _stand_in_for_host_copies() -> None:
    """moe_utils.py:1076 `maybe_move_tensor_to_cpu` leaves a CPU tensor a tensor; all_to_all splits must be numbers."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, **_kwargs: Any) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu
    token_dispatcher.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu


def _accept_cpu_tensor_types() -> None:
    """Spell a CPU tensor's type the way optimizer code expects, while its functions run.

    They compare `param.type()` with 'torch.cuda.FloatTensor' (optimizer.py:671, distrib_optimizer.py:361 and 582,
    clip_grads.py:167).
    """
    from megatron.core.optimizer import clip_grads, optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    mixed_precision = optimizer.Float16OptimizerWithFloat16Params
    mixed_precision.__init__ = _with_cuda_type_names(mixed_precision.__init__)
    for name in ("_build_model_and_main_param_groups", "_copy_main_params_to_model_params", "__init__"):
        setattr(DistributedOptimizer, name, _with_cuda_type_names(DistributedOptimizer.__dict__[name]))
    clip = _with_cuda_type_names(clip_grads.clip_grad_by_total_norm_fp32)
    clip_grads.clip_grad_by_total_norm_fp32 = optimizer.clip_grad_by_total_norm_fp32 = clip


def _with_cuda_type_names(function: Any) -> Any:
    if isinstance(function, (classmethod, staticmethod)):
        return type(function)(_with_cuda_type_names(function.__func__))

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with _cuda_type_names():
            return function(*args, **kwargs)

    return wrapper


@contextlib.contextmanager
def _cuda_type_names() -> Iterator[None]:
    real = torch._C.TensorBase.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = real(self, *args, **kwargs)
        if isinstance(answer, str) and not answer.startswith("torch.cuda."):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    nested = "type" in torch.Tensor.__dict__
    torch.Tensor.type = type_name  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        if not nested:
            del torch.Tensor.type


def _offload_to_the_same_memory() -> None:
    """hybrid_optimizer.py:256-285 offloads what `is_cuda`; let it offload every parameter, to a copy beside it."""
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    offload = HybridDeviceOptimizer._get_sub_optimizer_param_groups

    def offload_all(self: Any, _fraction: float) -> Any:
        own = {id(parameter) for group in self.param_groups for parameter in group["params"]}
        torch.Tensor.is_cuda = property(lambda tensor: id(tensor) in own)  # type: ignore[assignment]
        torch.Tensor.pin_memory = lambda tensor: tensor  # type: ignore[method-assign,assignment,misc]
        try:
            return offload(self, 1.0)
        finally:
            del torch.Tensor.is_cuda, torch.Tensor.pin_memory

    HybridDeviceOptimizer._get_sub_optimizer_param_groups = offload_all
