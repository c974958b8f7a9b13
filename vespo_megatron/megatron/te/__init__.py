"""The policy's layers of Transformer Engine, where it can be used: what megatron-core's own spec of them leaves open."""
