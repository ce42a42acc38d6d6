"""How long to wait between tries of something that may come to work by itself."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

FIRST_BACKOFF_S: Final = 0.25
LONGEST_BACKOFF_S: Final = 5.0


class Backoff:
    """Waits between tries, from FIRST_BACKOFF_S on twice as long each time, at most LONGEST_BACKOFF_S.

    ``sleep`` takes seconds; tests give one that does not wait.
    """

    def __init__(self, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        self._sleep = sleep
        self._next_s = FIRST_BACKOFF_S

    async def wait(self, at_most_s: float = LONGEST_BACKOFF_S) -> None:
        """Waits once, for no longer than ``at_most_s`` seconds; the next wait is twice as long all the same."""
        await self._sleep(min(self._next_s, at_most_s))
        self._next_s = min(self._next_s * 2, LONGEST_BACKOFF_S)
