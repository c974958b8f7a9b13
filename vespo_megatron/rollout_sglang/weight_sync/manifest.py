"""Manifests of the servers: which slice of every Hugging Face tensor each rank holds, merged and compared.

`plugin/weights.py` makes a manifest in every rank of a server: Hugging Face name -> `"<dtype> <start>:<stop>,..."`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vespo_megatron.rollout_sglang.faults import ServerFault

_DESCRIBED = re.compile(r"(float32|bfloat16|float16) [0-9]{1,12}:[0-9]{1,12}(,[0-9]{1,12}:[0-9]{1,12})*")


@dataclass(frozen=True)
class ServedTensor:
    """What all servers together hold of one Hugging Face tensor."""

    dtype: str
    shape: tuple[int, ...]
    slices: frozenset[tuple[tuple[int, int], ...]]


def merge_manifests(manifests: Sequence[Sequence[dict[str, str]]], urls: Sequence[str]) -> dict[str, ServedTensor]:
    """What the servers hold, by Hugging Face name.

    Raises `ServerFault` when a server's ranks together do not hold every element of a tensor, or when two servers
    serve different models.
    """
    merged: list[dict[str, ServedTensor]] = []
    for ranks, url in zip(manifests, urls, strict=True):
        parts: dict[str, set[str]] = {}
        for rank in ranks:
            for name, part in rank.items():
                parts.setdefault(name, set()).add(part)
        server: dict[str, ServedTensor] = {}
        for name, described in parts.items():
            if bad := [text for text in described if not _DESCRIBED.fullmatch(text)]:
                raise ServerFault(f"describes {name!r} as {bad[0][:80]!r}", url=url, expected="a dtype and a slice")
            dtypes = {text.partition(" ")[0] for text in described}
            slices = frozenset(parse_slice(text) for text in described)
            if len({len(ranges) for ranges in slices}) != 1:
                raise ServerFault(
                    f"describes {name!r} as {sorted(described)}", url=url, expected="slices of one tensor"
                )
            shape = tuple(
                max(stops) for stops in zip(*([stop for _, stop in ranges] for ranges in slices), strict=True)
            )
            held = sum(_numel(ranges) for ranges in slices)
            if len(dtypes) != 1 or held != _numel([(0, size) for size in shape]):
                raise ServerFault(
                    f"holds {held} elements of {name} as {sorted(described)}",
                    url=url,
                    expected=f"every element of {shape} once, in one dtype",
                )
            server[name] = ServedTensor(dtypes.pop(), shape, slices)
        merged.append(server)
    for server, url in zip(merged[1:], urls[1:], strict=True):
        differing = [name for name in merged[0].keys() | server.keys() if not _same_tensor(merged[0], server, name)]
        if differing:
            raise ServerFault(
                f"serves another model than {urls[0]}: {len(differing)} tensors differ, for instance {differing[0]}",
                url=url,
            )
    result = dict(merged[0])
    for server in merged[1:]:
        for name, tensor in server.items():
            result[name] = ServedTensor(tensor.dtype, tensor.shape, result[name].slices | tensor.slices)
    return result


def _same_tensor(first: dict[str, ServedTensor], second: dict[str, ServedTensor], name: str) -> bool:
    a, b = first.get(name), second.get(name)
    return a is not None and b is not None and (a.dtype, a.shape) == (b.dtype, b.shape)


def parse_slice(described: str) -> tuple[tuple[int, int], ...]:
    """`"float32 0:64,0:32"` -> `((0, 64), (0, 32))`"""
    pairs = described.partition(" ")[2].split(",")
    return tuple((int(start), int(stop)) for start, _, stop in (pair.partition(":") for pair in pairs))


def _numel(ranges: Iterable[tuple[int, int]]) -> int:
    count = 1
    for start, stop in ranges:
        count *= stop - start
    return count
