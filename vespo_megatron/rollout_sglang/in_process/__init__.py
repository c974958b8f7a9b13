"""The in-process rollout engine: transformers' Qwen3-MoE in the trainer's own process, for fast tests and sweeps."""
