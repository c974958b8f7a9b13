"""A Hugging Face folder as it is written: safetensors of a bounded size, their index, configuration and tokenizer."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

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
        config: the content of config.json; None: that of `copy_from`.
    """

    def __init__(
        self, folder: Path, copy_from: Path | None, shard_bytes: int = 4 << 30, config: dict[str, Any] | None = None
    ) -> None:
        self.folder, self._copy_from, self._shard_bytes, self._config = folder, copy_from, shard_bytes, config
        self._partial = folder.with_name(folder.name + ".partial")
        self._weight_map: dict[str, str] = {}
        self._pending: dict[str, torch.Tensor] = {}
        self._bytes_of: Counter[str] = Counter()
        """dtype → how much of it there is."""
        self._filled = self._total = 0

    def begin(self) -> None:
        """Everything but the weights. Raises OSError where it cannot be written."""
        self.discard()
        self._partial.mkdir(parents=True)
        for file in self._copy_from.iterdir() if self._copy_from else ():
            if file.is_file() and not file.name.startswith("model") and file.suffix != ".safetensors":
                shutil.copy(file, self._partial / file.name)
        if self._config is not None:
            (self._partial / "config.json").write_text(json.dumps(self._config, indent=2) + "\n")

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """The next tensor, on any device. Raises OSError or SafetensorError where it cannot be written."""
        self._pending[name] = tensor.cpu().contiguous().clone()
        self._bytes_of[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
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
        """In config.json, where whoever loads the folder looks for it: a run's precision may be another one's.

        What most of the weights are in: correction biases are in float32 whatever the others are in.
        """
        path = self._partial / "config.json"
        if not self._bytes_of or not path.exists():
            return
        dtype, config = self._bytes_of.most_common(1)[0][0], json.loads(path.read_text())
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
