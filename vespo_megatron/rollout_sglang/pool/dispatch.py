"""Dispatch of calls to servers: pure, no clocks, no network.

Invariants, which the tests assert:

- a call holds requests of one group alone, and a group is not torn into more calls than its size needs;
- the calls of a group go to one server for as long as that server serves;
- otherwise the least loaded server gets the call;
- no server has more than `limit` requests in flight, unless one call alone is larger.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence

from vespo_megatron.rollout_sglang.engine import GenerationRequest

_REMEMBERED_GROUPS = 65536


class Dispatcher:
    """Remembers where groups are; the loads are the caller's.

    Args:
        limit: requests in flight per server.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._home: OrderedDict[str, int] = OrderedDict()

    def choose(self, group_id: str, count: int, loads: Mapping[int, int]) -> int | None:
        """The server for `count` requests of a group, None while it has no room.

        Args:
            loads: requests in flight by server, of the servers that serve; not empty.
        """
        home = self._home.get(group_id) if group_id else None
        server = home if home is not None and home in loads else min(loads, key=loads.__getitem__)
        if loads[server] != 0 and loads[server] + count > self.limit:
            return None
        if group_id:
            self._home[group_id] = server
            self._home.move_to_end(group_id)
            if len(self._home) > _REMEMBERED_GROUPS:
                self._home.popitem(last=False)
        return server

    def forget(self) -> None:
        """Prefix caches are empty: no group has a home."""
        self._home.clear()


def split_calls(requests: Sequence[GenerationRequest], size: int) -> Iterator[list[int]]:
    """Indices of `requests` in calls of at most `size`; a group is never mixed with another, nor torn without need."""
    groups: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(request.group_id or f"\0{request.request_id}", []).append(index)
    for indices in groups.values():
        for start in range(0, len(indices), size):
            yield indices[start : start + size]
