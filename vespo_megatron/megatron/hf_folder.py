"""A Hugging Face folder as it is written: safetensors of a bounded size, their index, configuration and tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from vespo_megatron.durable import publish_folder
from vespo_megatron.recipe.weight_files import INDEX


class FolderWriter:
    """Tensors in, one whole folder out: it has a provisional name until `finish`.

    Args:
        folder: what it will be called; one of an earlier attempt is replaced.
        copy_from: the folder whose configuration and tokenizer files belong beside the weights.
        shard_bytes: size at which the next safetensors file begins.
    """

    def __init__(self, folder: Path, copy_from: Path | None, shard_bytes: int) -> None:
        self.folder, self._copy_from, self._shard_bytes = folder, copy_from, shard_bytes
        self._partial = folder.with_name(folder.name + ".partial")
        self._weight_map: dict[str, str] = {}
        self._pending: dict[str, torch.Tensor] = {}
        self._dtypes: set[str] = set()
        self._filled = self._total = 0

    def begin(self) -> None:
        """Everything but the weights. Raises OSError where it cannot be written."""
        self.discard()
        self._partial.mkdir(parents=True)
        for file in self._copy_from.iterdir() if self._copy_from else ():
            if file.is_file() and not file.name.startswith("model") and file.suffix != ".safetensors":
                shutil.copy(file, self._partial / file.name)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """The next tensor, on any device. Raises OSError or SafetensorError where it cannot be written."""
        self._pending[name] = tensor.cpu().contiguous().clone()
        self._dtypes.add(str(tensor.dtype).removeprefix("torch."))
        self._filled += tensor.nbytes
        self._total += tensor.nbytes
        if self._filled >= self._shard_bytes:
            self._flush()

    def finish(self) -> None:
        """Write what is left and give the folder its name. Raises as `add` does."""
        if self._pending:
            self._flush()
        self._tell_dtype()
        index = {"metadata": {"total_size": self._total}, "weight_map": self._weight_map}
        (self._partial / INDEX).write_text(json.dumps(index, indent=1))
        if self.folder.exists():
            shutil.rmtree(self.folder)
        publish_folder(self._partial, self.folder)

    def _tell_dtype(self) -> None:
        """In config.json, where whoever loads the folder looks for it: a run's precision may be another one's."""
        path = self._partial / "config.json"
        if len(self._dtypes) != 1 or not path.exists():
            return
        (dtype,), config = self._dtypes, json.loads(path.read_text())
        changes = {key: dtype for key in ("dtype", "torch_dtype") if config.get(key, dtype) != dtype}
        if changes:
            path.write_text(json.dumps(config | changes, indent=2) + "\n")

    def discard(self) -> None:
        """Remove what is not finished."""
        shutil.rmtree(self._partial, ignore_errors=True)

    def _flush(self) -> None:
        name = f"model-{len(set(self._weight_map.values())) + 1:05d}.safetensors"
        save_file(self._pending, self._partial / name, metadata={"format": "pt"})
        self._weight_map.update(dict.fromkeys(self._pending, name))
        self._pending.clear()
        self._filled = 0
