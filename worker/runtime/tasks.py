"""Deadlines and cancelling of asyncio's tasks, without the traps of Python 3.11."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Iterable
from typing import Any, Final, TypeVar

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")

CANCEL_S: Final = 5.0


async def within(timeout_s: float | None, work: Awaitable[Answer]) -> Answer:
    """What ``work`` returns. Raises TimeoutError after so many seconds, never for None.

    Used in place of wait_for, which can swallow a cancel in Python 3.11.
    """
    async with asyncio.timeout(timeout_s):
        return await work


async def cancel_all(tasks: Iterable[asyncio.Future[Any]], timeout_s: float = CANCEL_S) -> set[asyncio.Future[Any]]:
    """Cancels tasks again and again until each has ended, because one that is handling an error may miss a cancel.

    Waits at most ``timeout_s``. Returns and logs the tasks that have not ended by then.
    """
    pending = {task for task in tasks if not task.done()}
    deadline = time.monotonic() + timeout_s
    while pending and (left_s := deadline - time.monotonic()) > 0:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=min(1.0, left_s))
    for task in pending:
        name = task.get_coro().__qualname__ if isinstance(task, asyncio.Task) else type(task).__name__  # type: ignore[union-attr]
        log.error("a task does not end although it is cancelled", extra={"task": name})
    return pending
