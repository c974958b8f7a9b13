"""What runs share: imported once, in the process they are forked from. It holds no threads and no CUDA."""

import transformers  # noqa: F401

import vespo_megatron.megatron.policy
import vespo_megatron.rollout_sglang.in_process
import vespo_megatron.trainer.async_loop
import vespo_megatron.trainer.loop
import vespo_megatron.trainer.worker  # noqa: F401
