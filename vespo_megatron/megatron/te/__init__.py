"""The policy's layers of Transformer Engine: what megatron-core's own spec of them leaves open."""
