"""Threads: one that takes call after call, and several that share a list of work."""

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


def side_by_side(threads: int, work: Callable[[Item], Answer], items: Sequence[Item]) -> Iterable[Answer]:
    """What ``work`` answers for each item, in order, on so many threads. Blocks; raises what the first failure raises."""
    if threads == 1 or len(items) <= 1:
        return map(work, items)
    return list(_pool(threads).map(work, items))


@lru_cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="pass")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has the pools, and none of their threads


class Thread:
    """A daemon thread that runs one call after another. A daemon, for a native call that hangs cannot be joined."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.busy_since: float | None = None
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def call(self, function: Callable[..., Answer], *arguments: Any) -> asyncio.Future[Answer]:
        """Queues a call; answers with a future of the running event loop. Does not block."""
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
        """From the thread itself: what is being done goes on, and has just shown that it does not hang."""
        self.busy_since = time.monotonic()

    def _run(self) -> None:
        while True:
            call = self._calls.get()
            self.busy_since = time.monotonic()
            call()
            self.busy_since = None
            del call  # what it holds, a model perhaps, need not wait for the next one
