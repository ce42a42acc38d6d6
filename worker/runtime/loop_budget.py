"""How much of the worker's own work fits in one turn of the event loop, whichever stage it is of."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Final, TypeVar

RECORDS: Final = 1_024  # each costs a stage some microseconds
SLICE: Final = 512  # of many records, handled at once

Item = TypeVar("Item")


class TurnBudget:
    """Lets the event loop do something else whenever RECORDS records have been handled.

    The stages share one: each may pause in time, and still all of them could run in the same turn. Who has to wait has a
    turn for what was asked for: measured, that is what keeps turns short.
    """

    def __init__(self) -> None:
        self._handled = 0
        self._lock = asyncio.Lock()

    async def before(self, records: int) -> None:
        """So many records are about to be handled. Whoever has to wait does so in the order of asking."""
        async with self._lock:
            while self._handled and self._handled + records > RECORDS:
                self._handled = 0
                await asyncio.sleep(0)
            self._handled += records

    async def slices(self, items: Sequence[Item]) -> AsyncIterator[Sequence[Item]]:
        """N items in order, by SLICE at most, each slice when there is room for it."""
        for begin in range(0, len(items), SLICE):
            some = items[begin : begin + SLICE]
            await self.before(len(some))
            yield some

    def after(self, records: int) -> None:
        """So many have been handled by a stage that could not wait. Answers at once."""
        self._handled += records
