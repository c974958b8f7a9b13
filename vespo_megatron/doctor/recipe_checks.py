"""What of a recipe would fail on a node, before a job is queued: GPUs, versions, network, storage, memory."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vespo_megatron.doctor.findings import FAIL, OK, WARN, Finding
from vespo_megatron.errors import UserError
from vespo_megatron.launch import preflight
from vespo_megatron.megatron.hardware import GPU, gpu, named
from vespo_megatron.plan.planner import plan
from vespo_megatron.plan.published import shape_of
from vespo_megatron.plan.timing import default_lengths, fits
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.recipe.weight_files import weight_files
from vespo_megatron.rollout_sglang.server.cuda_stack import obstacles, stack_of
from vespo_megatron.run.devices import gpu_count, split, visible_gpus

_GIB = 2**30
_WRITTEN = 64 << 20
_READ_S = 1.0
_READ = 16 << 20
_INTERFACES = Path("/sys/class/net")


@dataclass(frozen=True)
class Node:
    """The GPUs to judge by: this machine's, or what was said instead."""

    gpus: tuple[str, ...]
    card: GPU | None
    """None: nothing is known of it."""
    is_here: bool

    @classmethod
    def of(cls, fake: str | None) -> Node:
        """`fake` is for instance 'h100-80x8'. Raises UserError for a card that is not known."""
        if fake is not None:
            match = re.fullmatch(r"(.+)x([1-9]\d*)", fake)
            if match is None:
                raise UserError(f"is {fake!r}", where="--fake-gpu", expected="a card and how many, as in h100-80x8")
            return cls(tuple(map(str, range(int(match[2])))), gpu(match[1]), False)
        count = gpu_count()
        return cls(visible_gpus(os.environ, count), _card_here() if count else None, True)


def _card_here() -> GPU | None:
    import torch

    return named(torch.cuda.get_device_name())


def rules(recipe: Recipe) -> Iterator[Finding]:
    """What `recipe check` says."""
    from vespo_megatron.recipe.rules import problems

    found = list(problems(recipe))
    yield from (Finding("recipe", FAIL, str(problem).splitlines()[0], problem.fix or "") for problem in found)
    if not found:
        yield Finding("recipe", OK, "keeps every rule")


def gpus(recipe: Recipe, node: Node) -> Iterator[Finding]:
    """Who gets which."""
    if recipe.cluster.device == "cpu":
        yield Finding("GPUs", OK, "are not used: cluster.device is cpu")
        return
    if not node.gpus:
        yield Finding("GPUs", FAIL, "there are none here", "run this on a node, or try --fake-gpu h100-80x8")
        return
    with_servers = recipe.slurm.layout == "colocated" or not recipe.slurm.rollout_nodes
    trainer = recipe
    if not with_servers:  # on nodes of their own
        trainer = recipe.with_values({"policy.generation.sglang_cfg.urls": ["http://elsewhere:1"]})
        yield from _split(recipe, node, "GPUs of a rollout node", with_trainer=False)
    elif recipe.slurm.layout == "colocated":  # of which the job's script says so
        trainer = recipe.with_values({"policy.generation.sglang_cfg.colocated": True})
    yield from _split(trainer, node, "GPUs of a trainer node", with_trainer=True)


def _split(recipe: Recipe, node: Node, name: str, *, with_trainer: bool) -> Iterator[Finding]:
    try:
        yield Finding(name, OK, str(split(recipe, node.gpus, with_trainer=with_trainer)))
    except UserError as error:
        yield Finding(name, FAIL, error.what, error.fix or "")


def versions(recipe: Recipe, node: Node) -> Iterator[Finding]:
    """Of the trainer's interpreter and the servers', and which transports they leave."""
    generation = recipe.policy.generation
    if generation.backend != "sglang" or generation.sglang_cfg.urls:
        return
    own, theirs = stack_of(sys.executable), stack_of(generation.sglang_cfg.python or sys.executable)
    yield Finding("trainer's PyTorch", OK, str(own))
    yield Finding("servers' PyTorch", OK, str(theirs))
    if recipe.cluster.device == "cpu":
        return
    for transport in ("distributed", "tensor", "disk"):
        reasons = "; ".join(obstacles(own, theirs, transport))
        wanted = transport == generation.sglang_cfg.weight_transport
        level = OK if not reasons else FAIL if wanted and node.is_here else WARN
        name = f"weights by {transport}" + (" (the recipe's)" if wanted else "")
        fix = "install the same PyTorch in both environments" if reasons else ""
        yield Finding(name, level, reasons or "can work", fix)


def network(recipe: Recipe) -> Iterator[Finding]:
    """The interface that is named, and the ports."""
    interface = recipe.cluster.network_interface
    if interface is not None:
        there = sorted(path.name for path in _INTERFACES.iterdir()) if _INTERFACES.is_dir() else []
        known = interface in there
        detail = f"{interface} is here" if known else f"{interface} is none of {', '.join(there)}"
        yield Finding("network interface", OK if known else FAIL, detail, "" if known else "see `ip link`")
    try:
        preflight.check_ports(recipe)
        yield Finding("servers' ports", OK, "are free")
    except UserError as error:
        yield Finding("servers' ports", FAIL, error.what, error.fix or "")


def storage(recipe: Recipe) -> Iterator[Finding]:
    """How fast the run's folder takes what is written, and the model's gives what is read."""
    yield from _writing(Path(recipe.exp_manager.exp_dir).resolve())
    model = Path(recipe.policy.model_name)
    if not (model / "config.json").is_file():
        yield Finding("model", WARN, f"{model} is not here", "run this where the recipe's files are")
        return
    files = weight_files(model)
    size, speed = sum(path.stat().st_size for path in files), _reading(files[0])
    seconds, allowed = size / speed, recipe.policy.generation.sglang_cfg.startup_timeout
    slow = seconds > allowed / 2
    detail = f"{size / _GIB:.1f} GiB, read at {speed / _GIB:.2f} GiB/s: {seconds:.0f} s"
    fix = f"raise policy.generation.sglang_cfg.startup_timeout above {allowed:g} s" if slow else ""
    yield Finding("model", WARN if slow else OK, detail, fix)


def _writing(folder: Path) -> Iterator[Finding]:
    there = folder
    while not there.exists():
        there = there.parent
    try:
        with tempfile.NamedTemporaryFile(dir=there) as file:
            data, started = os.urandom(_WRITTEN), time.perf_counter()
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            speed = _WRITTEN / (time.perf_counter() - started)
        yield Finding("run directory", OK, f"written at {speed / _GIB:.2f} GiB/s at {there}")
    except OSError as error:
        yield Finding("run directory", FAIL, f"{there} cannot be written ({error.strerror})", "set exp_manager.exp_dir")


def _reading(path: Path) -> float:
    """Bytes a second of a file, not of what is cached of it."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        read = 0
        while (got := len(file.read(_READ))) and time.perf_counter() - started < _READ_S:
            read += got
        return max(read, 1) / (time.perf_counter() - started)


def memory(recipe: Recipe, node: Node) -> Iterator[Finding]:
    """What a trainer process and a server need of a card."""
    if recipe.cluster.device == "cpu":
        return
    if node.card is None:
        yield Finding("memory", WARN, "nothing is known of this card", "name one that is like it with --fake-gpu")
        return
    made = plan(shape_of(recipe.policy.model_name), recipe, node.card, default_lengths(recipe))
    room = fits(made.memory.device, node.card)
    verdict = "fits" if room else "does not fit"
    detail = f"{verdict}: {made.memory.device / _GIB:.1f} of {node.card.memory_gib:g} GiB ({made.layout})"
    fix = "" if room else f"vespo-megatron plan … --gpu {node.card.name} --compare 8 shows layouts that fit"
    yield Finding("memory of a trainer process", OK if room else FAIL, detail, fix)
    slots = made.server.slots
    detail = f"fits, with room for {slots} sequences at a time" if slots else "does not fit: the weights alone are more"
    fix = "" if slots else "raise policy.generation.sglang_cfg.tensor_parallel_size"
    yield Finding("memory of a server", OK if slots else FAIL, detail, fix)
    if made.phases:
        most = max(made.phases, key=lambda phase: phase.total)
        verdict = "fits" if most.fits(node.card) else "does not fit"
        detail = f"{verdict}: {most.total / _GIB:.1f} of {node.card.memory_gib:g} GiB at most, in its phase {most.name}"
        fix = "" if most.fits(node.card) else "see `vespo-megatron plan`; lower mem_fraction_static"
        yield Finding("memory of a card that both share", OK if most.fits(node.card) else FAIL, detail, fix)


def examine(recipe: Recipe, node: Node) -> Iterator[Finding]:
    """Every finding, cheapest first."""
    yield from rules(recipe)
    yield from gpus(recipe, node)
    yield from memory(recipe, node)
    yield from network(recipe)
    yield from storage(recipe)
    yield from versions(recipe, node)
