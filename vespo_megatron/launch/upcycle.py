"""`vespo-megatron convert --upcycle`: a dense Hugging Face folder as an MoE that computes the same.

Every expert is a copy of the layer's MLP and the gates of a token's experts add up to one, so that the routers, which
are random, change nothing (sparse upcycling, arXiv 2212.05055). Noise on the experts lets them part.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

from vespo_megatron.errors import UserError
from vespo_megatron.families.family import family_of
from vespo_megatron.families.shape import ModelShape
from vespo_megatron.megatron.hf_folder import FolderWriter
from vespo_megatron.megatron.hf_mapping import expected_tensors
from vespo_megatron.megatron.hf_weights import SafetensorsFolder
from vespo_megatron.outputs import check_folder, written
from vespo_megatron.recipe.model_shape import read_shape, shape_of_config

_ROUTER_DEVIATION = 0.02
"""Of the routers' weights: `initializer_range` of the families that dense models become."""
_GIVEN = re.compile(r"experts=(\d+),topk=(\d+)")


def numbers_of(given: str) -> tuple[int, int]:
    """Experts, and experts per token, of `experts=4,topk=2`. Raises `UserError` for anything else."""
    match = _GIVEN.fullmatch(given)
    if match is None or not 1 <= int(match[2]) <= int(match[1]):
        raise UserError(f"is {given!r}", where="--upcycle", expected="experts=E,topk=K with 1 ≤ K ≤ E")
    return int(match[1]), int(match[2])


def upcycle(
    source: str | Path, target: str | Path, *, experts: int, topk: int, jitter: float = 0.0, seed: int = 0
) -> str:
    """Write the MoE to `target`; returns what was done, in a line.

    Args:
        source: a dense model's Hugging Face folder.
        jitter: noise on every matrix of every expert but the first, as a share of the matrix's standard deviation.
        seed: of routers and noise.

    Raises:
        UserError: the source is no dense model, none that an MoE family has the rest of, or damaged; the target exists
            or cannot be written.
    """
    folder, goal = Path(source), Path(target)
    dense = read_shape(folder)
    family = family_of(dense.model_type)
    if dense.num_moe_layers or family is None or family.as_moe is None:
        raise UserError(
            f"is a {dense.model_type}, which has no MoE of copies", where=str(folder), expected="a dense model"
        )
    with written(goal, "TARGET"):
        if goal.exists():
            raise UserError("exists", where=str(goal), fix="name a folder that does not")
    check_folder(goal, "TARGET")
    config = family.as_moe(json.loads((folder / "config.json").read_text()), experts, topk)
    shape, files = shape_of_config(config, where=str(goal)), SafetensorsFolder(folder, dense)
    writer = FolderWriter(goal, folder, config=config)
    generator = torch.Generator().manual_seed(seed)
    try:
        with written(goal, "TARGET"):
            writer.begin()
            for name, size in expected_tensors(shape).items():
                writer.add(name, _tensor(name, size, shape, files, jitter, generator))
            writer.finish()
    finally:
        writer.discard()
    return f"{goal}: a {shape.model_type} of {experts} experts, {topk} for each token, of {folder}"


def _tensor(
    name: str,
    size: tuple[int, ...],
    shape: ModelShape,
    files: SafetensorsFolder,
    jitter: float,
    generator: torch.Generator,
) -> torch.Tensor:
    names = shape.names
    match = re.fullmatch(r"(model\.layers\.\d+\.)(.+)", name)
    prefix, inside = (match[1], match[2]) if match else ("", name)
    if inside == names.router:
        drawn = torch.randn(size, generator=generator) * _ROUTER_DEVIATION
        return drawn.to(files[f"{prefix}input_layernorm.weight"].dtype)
    if not inside.startswith(names.experts):
        return files[name]
    number, _, projection = inside.removeprefix(names.experts).partition(".")
    own = {names.gate: "gate_proj", names.up: "up_proj", names.down: "down_proj"}[projection]
    weight = files[f"{prefix}mlp.{own}.weight"]
    if number == "0" or not jitter:
        return weight
    noise = torch.randn(size, generator=generator) * (jitter * weight.float().std())
    return (weight.float() + noise).to(weight.dtype)
