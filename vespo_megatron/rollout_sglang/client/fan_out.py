"""One call to each of several servers, side by side, whose failures become one error that names every server."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from typing import Generic, TypeVar

from vespo_megatron.rollout_sglang.faults import ServerFault, as_one_error

T = TypeVar("T")

_OTHER_FAILURES_S = 0.5
"""After one server's failure, so long is waited for those of others."""


@dataclass(frozen=True)
class PendingCall(Generic[T]):
    """A call that is under way to one server."""

    url: str
    reply: Future[T]


def replies(calls: Sequence[PendingCall[T]], timeout_s: float | None = None) -> list[T]:
    """What the servers reply, in order.

    Raises what `raise_failures` does as soon as one fails, and `ServerFault` when one has not answered within
    `timeout_s` (None: each call has a deadline of its own).
    """
    wait([call.reply for call in calls], timeout_s, return_when=FIRST_EXCEPTION)
    raise_failures(calls)
    overdue = [
        ServerFault(f"did not answer within {timeout_s:g} s", url=call.url) for call in calls if not call.reply.done()
    ]
    if overdue:
        raise as_one_error(overdue)
    return [call.reply.result() for call in calls]


def raise_failures(calls: Sequence[PendingCall[T]]) -> None:
    """Raise the failures of calls that are already answered, if any: `ServerFault`, or `ServersFailed` for several.

    An error that is no server's fault is raised as it is.
    """
    if not any(_failure(call) for call in calls):
        return
    wait([call.reply for call in calls], _OTHER_FAILURES_S)
    failures = [failure for failure in map(_failure, calls) if failure is not None]
    faults = [failure for failure in failures if isinstance(failure, ServerFault)]
    if len(faults) < len(failures):
        raise next(failure for failure in failures if not isinstance(failure, ServerFault))
    raise as_one_error(faults)


def _failure(call: PendingCall[T]) -> BaseException | None:
    return call.reply.exception() if call.reply.done() and not call.reply.cancelled() else None
