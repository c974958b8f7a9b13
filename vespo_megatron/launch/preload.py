"""What runs share: imported once, in the process they are forked from. It holds no threads and no CUDA."""

import transformers  # noqa: F401

import vespo_megatron.launch.worker  # noqa: F401
