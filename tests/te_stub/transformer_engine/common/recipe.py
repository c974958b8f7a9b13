"""Stand-in for common/recipe/__init__.py: names that megatron-core mentions; nothing runs in FP8 here."""

from __future__ import annotations


class DelayedScaling:
    def __init__(self, **_settings: object) -> None:
        raise RuntimeError("the stand-in has no FP8")
