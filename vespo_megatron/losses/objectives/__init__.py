"""φ of every objective (VESPO, GRPO, GSPO, SAPO, …): the detached coefficient of A·∇log π in −Σ φ·A·log π.

Each function takes `Ratios` and its hyperparameters and returns `[num_sequences]` (sequence objectives) or `[tokens]`
(token objectives). ρ_t = π_θ/π_anchor per token, S = Σ log ρ over the whole response, T its length, W = e^S.
"positive" means A ≥ 0. Bounds are inclusive: a ratio exactly on a bound still has its gradient.

Importing this package registers all of them.
"""

from vespo_megatron.losses.objectives import behavior, mini_batch, sequence, token

__all__ = ["behavior", "mini_batch", "sequence", "token"]
