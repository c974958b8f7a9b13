"""What guarded processes share: imported once, in the process they are forked from. It holds no threads and no CUDA."""

import math_verify  # noqa: F401
import numpy  # noqa: F401  (of prompts, which environments are given)

import vespo_megatron.rewards.pool  # noqa: F401
