"""The safetensors files of a Hugging Face folder: which there are, and whether they are whole. Reads headers alone."""

from __future__ import annotations

import os
from pathlib import Path, PurePath

from vespo_megatron.errors import UserError
from vespo_megatron.json_text import parse_json

INDEX = "model.safetensors.index.json"
_LARGEST_HEADER = 100_000_000
"""Bytes; safetensors' own bound (https://github.com/huggingface/safetensors, `MAX_HEADER_SIZE`)."""


def weight_files(folder: Path) -> list[Path]:
    """In order of their names. Raises UserError when there are none or the index is damaged."""
    index = folder / INDEX
    if index.exists():
        return [folder / name for name in _names_of(index)]
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    raise UserError("holds no weights", where=str(folder), expected=f"model.safetensors, or {INDEX} and its shards")


def _names_of(index: Path) -> list[str]:
    try:
        content = parse_json(index.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"is damaged ({error})", where=str(index), fix="copy it again") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) and _is_beside(name) for name in names):
        raise UserError(
            "is damaged",
            where=str(index),
            expected="weight_map: tensor → name of a file beside it",
            fix="copy it again",
        )
    return sorted(set(names))


def _is_beside(name: str) -> bool:
    return name == PurePath(name).name and name not in ("", "..")


def check_safetensors(path: Path) -> None:
    """Compare a file's size with what its header says (8 bytes of length, JSON, then the tensors).

    Raises:
        UserError: missing, truncated or damaged.
    """
    try:
        size = os.path.getsize(path)
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            if header_size > size - 8:
                raise _wrong(path, f"is truncated: {size} bytes do not hold its header")
            if header_size > _LARGEST_HEADER:
                raise _wrong(path, f"is damaged: a header of {header_size} bytes, where {_LARGEST_HEADER} are the most")
            end = _end(parse_json(file.read(header_size)))
    except FileNotFoundError:
        raise _wrong(path, "is named by the index but missing") from None
    except (OSError, ValueError) as error:
        raise _wrong(path, f"is damaged ({error})") from None
    expected = 8 + header_size + end
    if size != expected:
        what = "is truncated" if size < expected else "is damaged"
        raise UserError(f"{what}: it has {size} bytes", where=str(path), expected=f"{expected}", fix="copy it again")


def _end(header: object) -> int:
    """Bytes of all tensors. Raises ValueError for a header that is none."""
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    ends = [0]
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        match entry:
            case {"data_offsets": [int(begin), int(end)]} if 0 <= begin <= end:
                ends.append(end)
            case _:
                raise ValueError(f"its header has no place for {name[:100]!r}")
    return max(ends)


def _wrong(path: Path, what: str) -> UserError:
    return UserError(what, where=str(path), fix="copy it again")
