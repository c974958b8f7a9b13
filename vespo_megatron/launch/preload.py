"""What runs share: imported once, in the process they are forked from. It holds no threads and no CUDA."""

from __future__ import annotations

import importlib

for module in (
    "transformers",
    "vespo_megatron.launch.worker",
    "vespo_megatron.megatron.policy",
    "vespo_megatron.rollout_sglang.in_process.engine",
    "vespo_megatron.trainer.loop",
):
    importlib.import_module(module)
