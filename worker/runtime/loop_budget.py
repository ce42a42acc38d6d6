"""How much of the worker's own work fits into one turn of the event loop, whichever stage it belongs to."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Final, TypeVar

RECORDS: Final = 1_024  # in one turn; each costs a stage some microseconds
SLICE: Final = 512  # records of a larger batch that are handled at once

Item = TypeVar("Item")


class TurnBudget:
    """Lets the event loop do something else whenever RECORDS records have been handled.

    The stages share one budget: if each paused by itself, all of them could still run in the same turn. A stage that has to
    wait then gets a turn of its own for what it asked for; measurements showed that this keeps turns short.
    """

    def __init__(self) -> None:
        self._handled = 0
        self._lock = asyncio.Lock()

    async def before(self, records: int) -> None:
        """Waits until so many records may be handled. Those who wait go on in the order of asking."""
        async with self._lock:
            while self._handled and self._handled + records > RECORDS:
                self._handled = 0
                await asyncio.sleep(0)
            self._handled += records

    async def slices(self, items: Sequence[Item]) -> AsyncIterator[Sequence[Item]]:
        """Yields N items in order, in slices of at most SLICE, each when it may be handled."""
        for begin in range(0, len(items), SLICE):
            some = items[begin : begin + SLICE]
            await self.before(len(some))
            yield some

    def after(self, records: int) -> None:
        """Counts records that a stage has handled without being able to wait. Returns at once."""
        self._handled += records
