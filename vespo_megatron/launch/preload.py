"""What runs share: imported once, in the process they are forked from. It holds no threads and no CUDA."""

from __future__ import annotations

import importlib
import os

# Whether there is a GPU is then asked of the driver's library: what asks CUDA itself, as megatron-core does when it is
# imported, leaves children that cannot use it.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

for module in (
    "transformers",
    "vespo_megatron.launch.worker",
    "vespo_megatron.megatron.policy",
    "vespo_megatron.rollout_sglang.in_process.engine",
    "vespo_megatron.trainer.loop",
):
    importlib.import_module(module)
