"""What every run imports, for the process that runs are forked from."""

import transformers  # noqa: F401

import vespo_megatron.megatron.policy
import vespo_megatron.rollout_sglang.in_process
import vespo_megatron.trainer.loop
import vespo_megatron.trainer.worker  # noqa: F401
