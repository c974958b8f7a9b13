"""The asynchronous loop: the synchronous one, but batches wait already, and weights go out every N steps."""

from __future__ import annotations

import math
from typing import Any

from vespo_megatron.trainer.loop import Trainer
from vespo_megatron.trainer.objective import Objective


class AsyncTrainer(Trainer):
    """One rank of an asynchronous run; rank 0's controller is an `AsyncController`.

    Weight versions count the updates of the engine, so that a lag is a number of them, whatever N is.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.asynchronous = self.recipe.grpo.async_grpo
        self.objective = Objective(self.recipe.loss_fn, max_lag=math.ceil(self.asynchronous.staleness))

    def after_updates(self, step: int) -> None:
        """New weights for the rollouts under way, every `sync_every` steps."""
        if step % self.asynchronous.sync_every == 0:
            self.push_weights(self.weight_version + 1)
