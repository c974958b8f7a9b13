"""The lock between generation and weight updates, from threads and from event loops."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from vespo_megatron.errors import UserError
from vespo_megatron.rollout_sglang.readers_writer_lock import ReadersWriterLock


def entered(lock):
    """An event that a reader in a thread of its own sets once it is inside."""
    inside = threading.Event()

    def read():
        with lock.read():
            inside.set()

    threading.Thread(target=read, daemon=True).start()
    return inside


def test_readers_are_inside_together_in_threads_and_event_loops():
    lock = ReadersWriterLock()

    async def read():
        async with lock.reading(), lock.reading():
            with lock.read():
                assert lock.has_readers

    asyncio.run(asyncio.wait_for(read(), 5))
    assert not lock.has_readers


def test_a_writer_waits_for_readers_and_holds_new_ones_back():
    lock, order = ReadersWriterLock(), []

    def write():
        with lock.write(5.0):
            order.append("written")

    async def scenario():
        async with lock.reading():
            writer = threading.Thread(target=write)
            writer.start()
            while not lock._writing:
                await asyncio.sleep(0.001)
            second = entered(lock)
            assert not second.wait(0.05) and order == []
        assert await asyncio.to_thread(second.wait, 5) and order == ["written"]
        writer.join()

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_readers_of_both_kinds_wait_for_a_writer():
    lock = ReadersWriterLock()

    async def read():
        async with lock.reading():
            return True

    async def scenario():
        with lock.write():
            coming, thread = asyncio.create_task(read()), entered(lock)
            await asyncio.sleep(0.05)
            assert not coming.done() and not thread.is_set()
        assert await coming
        assert await asyncio.to_thread(thread.wait, 5)

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_blocked_readers_wait_until_they_are_admitted_and_writers_do_not():
    lock = ReadersWriterLock()
    lock.block_readers()
    inside = entered(lock)
    with lock.write(1.0):
        pass
    assert not inside.wait(0.05)
    lock.admit_readers()
    assert inside.wait(5)


def test_a_second_writer_and_a_reader_that_stays_are_errors_and_leave_the_lock_usable():
    lock = ReadersWriterLock()
    with lock.write(), pytest.raises(UserError, match="already under way"), lock.write():
        pass
    with lock.read():
        start = time.monotonic()
        with pytest.raises(UserError, match=r"did not end within 0\.05 s"), lock.write(0.05):
            pass
        assert time.monotonic() - start < 5
        with lock.write(wait=False):
            assert lock.has_readers
    assert entered(lock).wait(5)
