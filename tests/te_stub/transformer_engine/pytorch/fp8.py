"""Stand-in for pytorch/fp8.py, where FP8 is never on."""

from __future__ import annotations

import contextlib


class FP8GlobalStateManager:
    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


def fp8_autocast(enabled: bool = False, **_settings: object):
    assert not enabled, "the stand-in has no FP8"
    return contextlib.nullcontext()


def fp8_model_init(enabled: bool = False, **settings: object):
    return fp8_autocast(enabled)
