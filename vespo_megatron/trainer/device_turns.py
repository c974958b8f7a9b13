"""Whose turn it is with the devices that the trainer and the servers of a colocated run share.

| phase   | parameters | gradients, optimizer | activations | weight buckets | server: weights | server: cache, graphs |
|---------|------------|----------------------|-------------|----------------|-----------------|-----------------------|
| train   | device     | device               | device      |                |                 |                       |
| weights | device     | host                 |             | device         | device          |                       |
| servers | host       | host                 |             |                | device          | device                |

A run begins in `train`: servers give their memory back before the trainer builds anything (`launch/worker.py`). What a
server gives back it forgets, so `servers` follows `weights` alone. Gradients are nowhere but in `train`: they come back
as zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

from vespo_megatron.controller.controller import Controller
from vespo_megatron.errors import UserError
from vespo_megatron.megatron.parked_memory import ParkedMemory


class Phase(Enum):
    """See the module."""

    TRAIN = "train"
    WEIGHTS = "weights"
    SERVERS = "servers"


class NoServerUp(UserError):
    """There is nobody to give memory to, or weights."""


class DeviceTurns:
    """One rank's; every method is a collective, and does nothing where devices are not shared.

    Args:
        memory: this rank's policy's.
        call: does something on rank 0 while the others wait (`ControllerLink.call`).
        meet: returns when every rank has called it.
    """

    def __init__(
        self,
        memory: ParkedMemory,
        call: Callable[[Callable[[Controller], Any]], Any],
        meet: Callable[[], None],
        *,
        shared: bool,
    ) -> None:
        self._memory, self._call, self._meet, self.shared = memory, call, meet, shared
        self.phase = Phase.TRAIN

    @property
    def servers_can_generate(self) -> bool:
        """Whether they have what they need; always where nothing is shared."""
        return not self.shared or self.phase is Phase.SERVERS

    def to_trainer(self) -> None:
        """Nothing of the servers is left on the devices, and all of the trainer is back."""
        if not self.shared or self.phase is Phase.TRAIN:
            return
        self._call(Controller.release_memory)
        self._memory.restore()
        self.phase = Phase.TRAIN

    def to_weights(self) -> None:
        """The trainer has its parameters and nothing else: there is room for a weight update.

        All servers have given everything back, those that came up meanwhile as well. Where none is up, the trainer
        leaves the devices until one is.
        """
        if not self.shared:
            return
        self._memory.park("gradients", "optimizer")
        try:
            self._call(_release_of_some)
        except NoServerUp:
            self._memory.park("parameters")
            self._meet()
            self._call(Controller.await_server)
        self._memory.restore("parameters")
        self.phase = Phase.WEIGHTS

    def to_servers(self) -> None:
        """Nothing of the trainer is left on any device, its weight buckets neither; servers that were updated serve."""
        if not self.shared:
            return
        self._memory.park("parameters")
        self._meet()
        self._call(Controller.resume_memory)
        self.phase = Phase.SERVERS


def _release_of_some(controller: Controller) -> None:
    if controller.release_memory() == 0:
        raise NoServerUp("no server is up", where="rollout servers")
