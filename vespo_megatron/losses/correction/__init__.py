"""Corrections of the gap between the policy that is trained and the policy that drew the tokens.

With w = π_train/μ, a correction is a weight (`weights`) **and** any number of rejections (`rejection`), in every
behaviour mode: π_train is π_old where it is known, and π_θ in behaviour mode `rollout`.
"""

from vespo_megatron.losses.correction.config import CorrectionConfig
from vespo_megatron.losses.correction.rejection import Rejection

__all__ = ["CorrectionConfig", "Rejection"]
