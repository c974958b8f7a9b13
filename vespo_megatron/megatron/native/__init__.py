"""The `native` layer spec: plain PyTorch layers that run on CPU and on any GPU, and the reference for the others."""

from vespo_megatron.megatron import cpu_runtime

cpu_runtime.install()  # before the layers import megatron-core
