"""What ranks with the stand-in run: any work of tests/parallel, with layers of a given kind."""

from __future__ import annotations

import unittest.mock
from collections.abc import Callable
from typing import Any

from vespo_megatron.megatron import model


def with_layers(store: str, layers: str, work: Callable[..., Any], **kwargs: Any) -> Any:
    """`work(...)` with policies of `layers`, "te" or "native", on a CPU, where only native ones are for users."""
    with unittest.mock.patch.object(model, "layers_of", lambda *_: layers):
        return work(store=store, **kwargs)
