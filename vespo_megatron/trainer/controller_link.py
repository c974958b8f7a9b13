"""What all ranks do together with rank 0's controller: calls that it answers, and weights that all of them stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, TypeVar

import torch.distributed as dist

from vespo_megatron.controller.controller import Controller
from vespo_megatron.errors import UserError
from vespo_megatron.megatron.policy import MegatronPolicy
from vespo_megatron.megatron.weight_history import WeightHistory
from vespo_megatron.quantization import WeightQuantizer
from vespo_megatron.rollout_sglang.faults import WeightsNeeded
from vespo_megatron.trainer.device_turns import DeviceTurns

T = TypeVar("T")


class ControllerLink:
    """One rank's end of it; every method is a collective.

    Args:
        controller: rank 0's; None elsewhere.
        group: of all ranks, with a deadline that fits what a controller waits for.
        history: is told of every version that the engine is given.
        quantizer: rounds weights on their way to the engine; the policy keeps its own.
        shares_devices: whether the engine's servers and the policy take turns on the same ones.
    """

    def __init__(
        self,
        policy: MegatronPolicy,
        controller: Controller | None,
        group: dist.ProcessGroup,
        history: WeightHistory | None = None,
        quantizer: WeightQuantizer | None = None,
        *,
        shares_devices: bool = False,
    ) -> None:
        if (controller is None) != (policy.rank_info.rank != 0):
            raise ValueError("rank 0 has the controller, the others have none")
        self.policy, self.controller, self.group, self.history = policy, controller, group, history
        self.quantizer = quantizer
        self.turns = DeviceTurns(policy.memory, self.call, lambda: dist.barrier(group), shared=shares_devices)
        self.weight_version = 0
        """Of the weights that the engine has."""
        self._pushed_at: int | None = policy.updates_taken
        """Updates that the policy had taken when its weights were those of the engine; None: others than it has."""

    @property
    def engine_is_behind(self) -> bool:
        """Whether the policy was updated since the engine's weights were its own."""
        return self._pushed_at != self.policy.updates_taken

    def call(self, action: Callable[[Controller], T]) -> T | None:
        """Run `action` on rank 0 while the others wait; its `UserError` ends every rank. Rank 0 gets the answer."""
        answer, failure = None, None
        if self.controller is not None:
            try:
                answer = action(self.controller)
            except UserError as error:
                failure = error
        self._raise_everywhere(failure)
        return answer

    def call_with_servers(self, action: Callable[[Controller], T]) -> T | None:
        """As `call`; servers that come back in the middle of it are given their weights, and it goes on.

        So are servers that had given their devices to the trainer, before it.
        """
        if not self.turns.servers_can_generate:
            self.push_again()
        while True:
            try:
                return self.call(action)
            except WeightsNeeded:
                self.push_again()

    def push_again(self) -> None:
        """Weights to an engine that may have lost its own, under the number of what it receives.

        That is the number it knows where the same weights can be had again: the policy was not updated since, or
        `history` holds them. Else they are a version between two of the schedule's.
        """
        if self.history is None and self.engine_is_behind:
            self.push_weights(self.weight_version + 1, between=True)
        else:
            self.push_weights(self.weight_version)

    def push_weights(self, version: int, *, between: bool = False) -> None:
        """Stream the policy's weights to the rollout engine, which answers with an agreed checksum.

        Returns on every rank when the servers have them. An update in which a server fails is made again without it.
        `between` says that the version is not one of the schedule's.
        """
        self.turns.to_weights()
        with self.history.pushing(version) if self.history is not None else nullcontext():
            self._push(version, between)
        self.turns.to_servers()
        self.weight_version = version
        if self.history is None or self.history.live == version:
            self._pushed_at = self.policy.updates_taken

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, as JSON."""
        return {"weight_version": self.weight_version, "engine_is_behind": self.engine_is_behind}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, with the policy of its checkpoint."""
        self.weight_version = state["weight_version"]
        self._pushed_at = None if state.get("engine_is_behind", False) else self.policy.updates_taken

    def _push(self, version: int, between: bool) -> None:
        while True:
            stream = self.policy.exporter.stream()
            failure = None
            if self.controller is not None:
                try:
                    sent = self.quantizer(stream) if self.quantizer else stream
                    self.controller.update_weights(sent, version, between=between)
                except UserError as error:
                    failure = error
            for _ in stream:  # elsewhere all of it; here what a failed update has left, for which the others wait
                pass
            try:
                self._raise_everywhere(failure)
                return
            except WeightsNeeded:
                continue

    def _raise_everywhere(self, failure: UserError | None) -> None:
        """Raise on every rank what rank 0 has met."""
        shared = [failure]
        dist.broadcast_object_list(shared, src=0, group=self.group)
        if shared[0] is not None:
            raise shared[0]
