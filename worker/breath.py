"""How much of the worker's own work fits in one turn of the event loop, whichever stage it is of."""

import asyncio
from typing import Final

RECORDS: Final = 1_024  # each costs a stage some microseconds


class Breath:
    """Lets the event loop do something else whenever RECORDS records have been handled.

    All stages share one, for those that each pause in time may still all have their turn in one and the same.
    """

    def __init__(self) -> None:
        self._handled = 0
        self._lock = asyncio.Lock()

    async def before(self, records: int) -> None:
        """So many records are about to be handled, without an await. Whoever has to wait does so in the order of asking."""
        async with self._lock:
            if self._handled and self._handled + records > RECORDS:
                self._handled = 0
                await asyncio.sleep(0)
            self._handled += records

    def after(self, records: int) -> None:
        """So many have been handled by who could not wait."""
        self._handled += records
