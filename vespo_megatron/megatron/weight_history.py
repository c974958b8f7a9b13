"""The last versions of this rank's weights, so that a token can be scored by those that drew it.

A version is what the rollout engine was given under that number. An asynchronous run holds ⌈max_staleness⌉ + 1 of them
in host memory, since no token is behind by more than ⌈max_staleness⌉ when it is trained on
(`controller/staleness.py`). A synchronous run holds none: a rollout batch is scored before the first update, by the
weights that drew it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from vespo_megatron.errors import UserError
from vespo_megatron.megatron.host_weights import HostWeights
from vespo_megatron.megatron.policy import MegatronPolicy


class WeightHistory:
    """See the module. Every rank holds its own shard; versions come, go and are asked for on all ranks alike.

    Args:
        keep: versions to hold; with 0, only the policy's weights as they are have a version.
    """

    def __init__(self, policy: MegatronPolicy, keep: int) -> None:
        self.policy, self.keep = policy, keep
        self._held: dict[int, HostWeights] = {}
        self._live: tuple[int, int] | None = None
        """(version that the policy's weights were, updates it had taken then)."""
        self.swap_seconds = 0.0
        """Spent on copying weights in and back, since it was last set to 0."""

    @property
    def held(self) -> list[int]:
        """Versions there is a copy of, oldest first."""
        return sorted(self._held)

    @property
    def live(self) -> int | None:
        """The version that the policy's weights are now; None once they were updated."""
        if self._live is None or self._live[1] != self.policy.updates_taken:
            return None
        return self._live[0]

    @property
    def nbytes(self) -> int:
        """Host memory of the copies."""
        return sum(weights.nbytes for weights in self._held.values())

    def remember(self, version: int) -> None:
        """The policy's weights are this version from here on; a copy of it takes the place of the oldest."""
        self.hold(version)
        self._live = (version, self.policy.updates_taken)

    def hold(self, version: int) -> None:
        """Keep a copy of the policy's weights under this number. What is not to be held any more goes."""
        if not self.keep:
            return
        spare = self._held.pop(version, None)
        while len(self._held) >= self.keep:
            spare = self._held.pop(min(self._held))
        weights = self.policy.weights()
        self._held[version] = spare if spare is not None else HostWeights(weights)
        self._held[version].copy_from(weights)

    @contextmanager
    def pushing(self, version: int) -> Iterator[None]:
        """Within the block the policy has the weights that the engine is to have under this number.

        A new number means the weights as they are. One that is known is sent once more, to servers that lost it, and
        means what it meant, though the policy may have been updated since.
        """
        if version in self._held or version == self.live:
            with self.under(version):
                yield
        else:
            self.remember(version)
            yield

    @contextmanager
    def under(self, version: int, *, where: str = "loss_fn.behavior") -> Iterator[None]:
        """Within the block the policy has the weights of that version; its own come back exactly.

        Args:
            where: who asks, for the error.

        Raises:
            UserError: there is no copy of that version.
        """
        if version == self.live:
            yield
            return
        if version not in self._held:
            raise UserError(
                f"was drawn by weight version {version}, which is not held",
                where=where,
                expected=f"one of {self.held or [self.live]}",
                fix="see that no other run gives weights to the same servers",
            )
        own = None if self.live is None else self._held.get(self.live)
        started = time.perf_counter()
        with self.policy.under(self._held[version], own=own):
            self.swap_seconds += time.perf_counter() - started
            yield
            started = time.perf_counter()
        self.swap_seconds += time.perf_counter() - started

    def to_save(self) -> Sequence[int]:
        """The versions that a checkpoint must hold beside the policy's weights."""
        return [version for version in self.held if version != self.live]
