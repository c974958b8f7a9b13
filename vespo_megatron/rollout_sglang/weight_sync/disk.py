"""Transport `disk`: safetensors in a folder that trainer and servers share; for servers that nothing else reaches.

A version is written to `<folder>/<version>.partial`, one file per bucket, renamed when it is whole, and loaded by
`/update_weights_from_disk`. The version before it is then removed. With `weight_sync_only_changed` a version holds what
changed: it is no checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from vespo_megatron.errors import UserError
from vespo_megatron.rollout_sglang.weight_sync.buckets import Bucket, Wait
from vespo_megatron.rollout_sglang.weight_sync.servers import Servers
from vespo_megatron.rollout_sglang.weight_sync.transport import check_shared

if TYPE_CHECKING:
    import torch

_WHERE = "policy.generation.sglang_cfg.weight_folder"
_SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class DiskTransport:
    """See `transport.Transport`.

    Args:
        folder: made when missing; it belongs to this transport alone.
    """

    opens_session = False  # `/update_weights_from_disk` is a whole session of SGLang's own

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="weight-writer")

    def connect(self, servers: Servers, ranks: Sequence[int]) -> None:  # noqa: ARG002  (a folder serves any rank)
        """Checks that every rank of every server sees what is written here."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder} cannot be made ({error.strerror})", where=_WHERE) from error
        check_shared(servers, str(self.folder), fix=f"set {_WHERE} to a folder of a filesystem that both have mounted")
        self._servers = servers

    def begin(self, version: int) -> None:
        """Removes what a failed update to this version has left."""
        self._version, self._count = f"v{version}", 0
        self._partial = self.folder / f"{self._version}.partial"
        for stale in (self._partial, self.folder / self._version):
            shutil.rmtree(stale, ignore_errors=True)
        self._partial.mkdir()

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Host memory: files are written from it."""
        import torch

        return torch.empty(num_bytes, dtype=torch.uint8)

    def send(self, bucket: Bucket) -> Wait:
        """Write one file, in a thread."""
        self._count += 1
        path = self._partial / f"model-{self._count:05d}.safetensors"
        written = self._writer.submit(write_safetensors, path, bucket)

        def wait() -> None:
            try:
                written.result()
            except OSError as error:
                raise UserError(
                    f"cannot be written ({error.strerror})",
                    where=str(path),
                    fix=f"free space there, or set {_WHERE}",
                ) from error

        return wait

    def finish(self) -> None:
        """Rename, let every server load, remove older versions. Nothing is loaded when nothing was sent."""
        whole = self.folder / self._version
        os.replace(self._partial, whole)
        if self._count:
            body = {"model_path": str(whole), "load_format": "safetensors", "flush_cache": False}
            self._servers.post_all("/update_weights_from_disk", body)
        for other in self.folder.glob("v*"):
            if other != whole:
                shutil.rmtree(other, ignore_errors=True)

    def disconnect(self) -> None:
        """Nothing stays open; the last version stays, for a server that is still loading it."""


def write_safetensors(path: Path, bucket: Bucket) -> None:
    """One bucket as a file: the format is a header and the bytes as they lie in the bucket, so none are copied.

    `safetensors.torch.save_file` would copy every tensor into a bytes object first: a third bucket of memory.
    """
    header: dict[str, object] = {}
    start = 0
    for name, dtype, shape in zip(bucket.names, bucket.dtypes, bucket.shapes, strict=True):
        end = start + _num_bytes(dtype, shape)
        header[name] = {"dtype": _SAFETENSORS_DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        rest = bucket.flat.numpy().data
        while rest:  # one write takes 2 GiB at most
            rest = rest[file.write(rest) :]


def _num_bytes(dtype: str, shape: list[int]) -> int:
    import torch

    return math.prod(shape) * getattr(torch, dtype).itemsize
