"""Ends of asyncio's tasks: deadlines and cancelling, without the traps of Python 3.11."""

import asyncio
from collections.abc import Awaitable, Iterable
from typing import Any, TypeVar

Answer = TypeVar("Answer")


async def within(timeout_s: float | None, work: Awaitable[Answer]) -> Answer:
    """What ``work`` answers; TimeoutError after so many seconds. Unlike wait_for, which in 3.11 can swallow a cancel."""
    async with asyncio.timeout(timeout_s):
        return await work


async def cancelled(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Cancels until every one has ended, for one that is catching its breath from an error may miss the first."""
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=1)
