"""How much of the worker's own work fits in one turn of the event loop, whichever stage it is of."""

import asyncio
from typing import Final

RECORDS: Final = 1_024  # each costs a stage some microseconds


class Breath:
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

    def after(self, records: int) -> None:
        """So many have been handled by a stage that could not wait. Answers at once."""
        self._handled += records
