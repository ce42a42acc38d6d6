"""Deadlines and cancelling."""

import asyncio
import contextlib

import pytest

from worker.runtime.tasks import cancel_all, within


async def test_within_answers_or_is_too_late() -> None:
    assert await within(60, asyncio.sleep(0, "answer")) == "answer"
    assert await within(None, asyncio.sleep(0, "answer")) == "answer"
    with pytest.raises(TimeoutError):
        await within(0.01, asyncio.sleep(10))


async def test_a_cancel_is_not_swallowed_by_an_answer_that_is_just_there() -> None:
    answer = asyncio.get_running_loop().create_future()

    async def wait_twice() -> None:
        await within(60, answer)
        await asyncio.sleep(120)

    task = asyncio.create_task(wait_twice())
    await asyncio.sleep(0)
    answer.set_result(None)
    task.cancel()
    await asyncio.wait({task}, timeout=60)
    assert task.cancelled()


async def test_cancel_all_cancels_until_it_works() -> None:
    misses = 2

    async def stubborn() -> None:
        nonlocal misses
        while True:
            try:
                await asyncio.sleep(10)
            except asyncio.CancelledError:
                if not misses:
                    raise
                misses -= 1

    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    assert not await cancel_all([task])
    assert task.cancelled()
    assert not await cancel_all([])


async def test_what_does_not_end_is_not_waited_for_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    is_over = asyncio.Event()

    async def endless() -> None:
        while not is_over.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await is_over.wait()

    task = asyncio.create_task(endless())
    await asyncio.sleep(0)
    assert await cancel_all([task], 0.05) == {task}
    assert "a task does not end although it is cancelled" in caplog.text
    is_over.set()
    await task
