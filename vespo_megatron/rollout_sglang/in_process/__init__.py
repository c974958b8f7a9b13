"""The in-process rollout engine: transformers' models in the trainer's own process, for fast tests and sweeps."""
