"""A small sample with everything that one can have: routes, a sampling mask, turns."""

from __future__ import annotations

import numpy as np

from vespo_megatron.data.sample import Sample
from vespo_megatron.data.sampling_mask import SamplingMask


def sample(version: int, name: str = "s") -> Sample:
    return Sample(
        name,
        "p",
        [1, 2],
        [3, 4, 5],
        [-0.5, -1.0, -0.1],
        [version, version, version + 1],
        "stop",
        routes=np.arange(8, dtype=np.uint8).reshape(4, 1, 2),
        route_versions=version,
        sampling_mask=SamplingMask.of([[3, 9], [], [5]]),
        turns=np.array([0, -1, 1]),
        turn_rewards=np.array([0.5, 1.0]),
        turn_advantages=np.array([-1.0, 0.25], dtype=np.float32),
        turn_facts={"tool_errors": 1.0},
    )
