"""VESPO on Megatron-core: RL training of Mixture-of-Experts language models. Importing this is free."""

__version__ = "0.1.0"
