"""Loss scale of training in float16: what the loss is multiplied with before the backward, one for the whole model.

megatron-core gives the optimizers of dense and of expert parameters a scaler each (optimizer/__init__.py:436), and
scales the loss by the first one's. They part ways where gradients of one kind alone overflow, and the other kind's are
then divided by another number than they were multiplied with. Here both have one, which moves once per update.
"""

from __future__ import annotations

from vespo_megatron.megatron.optimizer_state import parts_of
from vespo_megatron.recipe.schema import OptimizerConfig

# isort: split
# megatron.optimizer_state's package has installed the CPU runtime before megatron-core is imported
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.grad_scaler import DynamicGradScaler


class LossScale(DynamicGradScaler):
    """megatron-core's dynamic scale: halved by overflows, doubled after `loss_scale_window` updates without one."""

    def __init__(self, settings: OptimizerConfig) -> None:
        super().__init__(
            initial_scale=settings.initial_loss_scale,
            min_scale=settings.min_loss_scale,
            growth_factor=2.0,
            backoff_factor=0.5,
            growth_interval=settings.loss_scale_window,
            hysteresis=settings.hysteresis,
        )
        self._overflowed = False

    def share(self, optimizer: MegatronOptimizer) -> None:
        """Be the scale of every part of `optimizer`."""
        for part in parts_of(optimizer):
            part.grad_scaler = self

    @property
    def value(self) -> float:
        """What the next loss is multiplied with."""
        return self.scale.item()

    def is_smallest(self, value: float) -> bool:
        """Whether overflows at a scale of `value` have left it as it was."""
        return value <= self.min_scale.item()

    def update(self, found_inf: bool) -> None:
        """What a part of the optimizer tells of its own gradients, alike on every rank; see `settle`."""
        self._overflowed |= found_inf

    def settle(self) -> bool:
        """Move by what all parts have told of this update; whether any gradient has overflowed."""
        overflowed = self.forget()
        super().update(overflowed)
        return overflowed

    def forget(self) -> bool:
        """The same for gradients that no update is made of: the scale stays."""
        overflowed, self._overflowed = self._overflowed, False
        return overflowed
