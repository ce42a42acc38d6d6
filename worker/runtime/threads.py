"""Threads: one that runs call after call, and several that share a list of work."""

import asyncio
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


def parallel_map(threads: int, work: Callable[[Item], Answer], items: Sequence[Item]) -> Iterable[Answer]:
    """What ``work`` returns for each item, in order, computed on so many threads. Blocks; raises the first failure."""
    if threads == 1 or len(items) <= 1:
        return map(work, items)
    return list(_pool(threads).map(work, items))


@lru_cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="pass")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child inherits the pools but none of their threads


class SerialExecutor:
    """One daemon thread that runs one call after another. A daemon, because a native call that hangs cannot be joined."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.busy_since: float | None = None  # by time.monotonic; None while it is idle
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def call(self, function: Callable[..., Answer], *arguments: Any) -> asyncio.Future[Answer]:
        """Queues a call and returns its future, which belongs to the running event loop. Does not block."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()

        def settle(answer: Any, error: BaseException | None) -> None:
            if not future.done():
                future.set_exception(error) if error else future.set_result(answer)

        def run() -> None:
            answer, error = None, None
            try:
                answer = function(*arguments)
            except BaseException as raised:  # noqa: BLE001 - goes to whoever awaits
                error = raised
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle, answer, error)
            del answer, error  # an error's traceback holds this frame, and with it what failed: a model perhaps

        self._calls.put(run)
        return future

    def restart_clock(self) -> None:
        """Measures ``busy_since`` anew. A call of several parts does so between them, to show that it goes on."""
        self.busy_since = time.monotonic()

    def _run(self) -> None:
        while True:
            call = self._calls.get()
            self.busy_since = time.monotonic()
            call()
            self.busy_since = None
            del call  # what it holds, a model perhaps, is freed without waiting for the next call
