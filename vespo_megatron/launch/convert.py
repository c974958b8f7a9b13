"""`vespo-megatron convert`: a Hugging Face folder ↔ a Megatron distributed checkpoint, proved by checksum.

One process on the CPU unless torchrun starts more; `layout` then says how they share the model. The checkpoint itself
belongs to no layout: what any layout saved, any other loads.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vespo_megatron.durable import publish_folder
from vespo_megatron.errors import UserError
from vespo_megatron.families.shape import ModelShape
from vespo_megatron.launch.launcher import ALONE
from vespo_megatron.launch.model_source import Source, find_source
from vespo_megatron.megatron import checkpoint, cpu_runtime, hf_weights, parallel
from vespo_megatron.megatron.hf_mapping import expected_tensors, stored_dtype
from vespo_megatron.megatron.host_weights import weights_of
from vespo_megatron.megatron.model import build_model
from vespo_megatron.megatron.policy import DTYPES
from vespo_megatron.outputs import check_folder, written
from vespo_megatron.recipe.dotted import leaves
from vespo_megatron.recipe.loader import plain
from vespo_megatron.recipe.model_shape import read_shape
from vespo_megatron.recipe.schema import MegatronConfig
from vespo_megatron.rollout_sglang.checksum import WeightChecksum


def convert(
    source: str | Path,
    target: str | Path,
    *,
    model: str | None = None,
    layout: Sequence[str] = (),
    progress: bool = True,
) -> str:
    """Write `source` in the other format to `target`; returns what was done, in a line.

    Args:
        source: a Hugging Face folder; or a run, one of its checkpoints, or a distributed checkpoint of megatron-core's.
        model: the folder with config.json and tokenizer, where a checkpoint's own run does not tell.
        layout: `key=value` of `policy.megatron_cfg`, for several processes.

    Raises:
        UserError: the source is neither, the target exists or cannot be written, or what was written is not what was
            read.
    """
    what, goal, settings = find_source(Path(source), model), Path(target), _layout(layout)
    with written(goal, "TARGET"):
        if goal.exists():
            raise UserError("exists", where=str(goal), fix="name a folder that does not")
    check_folder(goal, "TARGET")
    partial = goal.with_name(goal.name + ".partial")
    with _joined(settings) as rank_info:
        shape = read_shape(what.model)
        dtype = _dtype(shape, what.model)
        weights = _Weights(
            build_model(shape, settings, rank_info, dtype=dtype, with_gradients=False), shape, rank_info, progress
        )
        if what.is_megatron:
            read, wrote = weights.to_hugging_face(what, partial, dtype)
        else:
            read, wrote = weights.to_megatron(what, partial, dtype)
        if rank_info.rank == 0:
            if wrote != read:
                raise UserError(f"holds other weights ({wrote}) than were read ({read})", where=str(partial))
            publish_folder(partial, goal)
        dist.barrier()
    return f"{goal}: {'Hugging Face folder' if what.is_megatron else 'distributed checkpoint'}, checksum {read}"


def convert_apart(source: Path, target: Path) -> None:
    """As `convert`, in a process of its own where this one sees a GPU: megatron-core would compute on that.

    Raises:
        UserError: as `convert` does; or the other process failed.
    """
    if cpu_runtime.installed():
        convert(source, target)
        return
    command = [sys.executable, "-m", "vespo_megatron.cli", "convert", str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(f"could not be converted: {done.stderr.strip()[-2000:]}", where=str(source))


@dataclass(frozen=True)
class _Weights:
    """The model in these processes; its methods are collectives and return (checksum read, checksum written)."""

    chunks: list[torch.nn.Module]
    shape: ModelShape
    rank_info: parallel.RankInfo
    progress: bool

    def to_hugging_face(self, source: Source, folder: Path, dtype: torch.dtype) -> tuple[str, str]:
        """The weights a distributed checkpoint holds, as they came into the processes, and as the files hold them."""
        checkpoint.load_weights(self.chunks, source.weights)
        hf_weights.save(self._exporter(), folder, copy_from=source.model)
        return self._checksum(), self._checksum_of(folder, dtype)

    def to_megatron(self, source: Source, folder: Path, dtype: torch.dtype) -> tuple[str, str]:
        """The weights of a Hugging Face folder, as its files hold them, and as they are after writing and loading."""
        hf_weights.load(self.chunks, source.weights, self.shape, self.rank_info)
        if self.rank_info.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        dist.barrier()
        checkpoint.save_weights(self.chunks, folder)()
        with torch.no_grad():  # so that what is read back is seen to come from the files
            for weight in weights_of(self.chunks):
                weight.zero_()
        checkpoint.load_weights(self.chunks, folder)
        return self._checksum_of(source.weights, dtype), self._checksum()

    def _exporter(self) -> hf_weights.WeightExporter:
        return hf_weights.WeightExporter(self.chunks, self.shape, self.rank_info)

    def _checksum(self) -> str:
        """Of the weights in the processes; of nothing on ranks other than 0."""
        from tqdm import tqdm

        total = WeightChecksum()
        hidden = None if self.progress and self.rank_info.rank == 0 else True  # None: shown where there is a terminal
        for name, tensor in tqdm(self._exporter().stream(), desc="checksum", unit="tensor", disable=hidden):
            total.add(name, tensor)
        return total.hexdigest()

    def _checksum_of(self, folder: Path, dtype: torch.dtype) -> str:
        """Of the weights in the files; of nothing on ranks other than 0."""
        total = WeightChecksum()
        if self.rank_info.rank == 0:
            files = hf_weights.SafetensorsFolder(folder, self.shape)
            for name in expected_tensors(self.shape):
                total.add(name, files[name].to(stored_dtype(name, self.shape, dtype)))
        return total.hexdigest()


def _layout(settings: Sequence[str]) -> MegatronConfig:
    try:
        given = plain(OmegaConf.from_dotlist(list(settings)), resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(
            str(error).splitlines()[0], where="--layout", expected="key=value of policy.megatron_cfg"
        ) from None
    return MegatronConfig().with_values(dict(leaves(given)))


@contextmanager
def _joined(layout: MegatronConfig) -> Iterator[parallel.RankInfo]:
    """One of torchrun's processes, or alone; the environment is left as it was, for what is started afterwards."""
    added = {name: value for name, value in ALONE.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield parallel.initialize(layout, seed=0, device=torch.device("cpu"))
    finally:
        parallel.finalize()
        for name in added:
            del os.environ[name]


def _dtype(shape: ModelShape, model: Path) -> torch.dtype:
    if shape.dtype not in DTYPES:
        raise UserError(f"is {shape.dtype}", where=f"dtype in {model}/config.json", expected=", ".join(DTYPES))
    return DTYPES[shape.dtype]
