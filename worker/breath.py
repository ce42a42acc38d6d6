"""How much of the worker's own work fits in one turn of the event loop, whichever stage it is of."""

import asyncio
from collections import deque
from typing import Final

RECORDS: Final = 1_024  # each costs a stage some microseconds


class Breath:
    """Keeps what is handled in a turn of the event loop to RECORDS records, or twice as many where a turn begins midway.

    The stages share one: each may pause in time, and still all of them could run in the same turn.
    """

    def __init__(self) -> None:
        self._handled = 0  # in this turn
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()

    async def before(self, records: int) -> None:
        """So many records are about to be handled: waits for a turn with room for them, or one of their own.

        Nobody who has asked is overtaken.
        """
        if self._waiting or not self._has_room(records):
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append((turn, records))
            await turn
        else:
            self.after(records)

    def after(self, records: int) -> None:
        """So many have been handled by a stage that could not wait. Answers at once."""
        if not self._handled:
            asyncio.get_running_loop().call_soon(self._next_turn)
        self._handled += records

    def _has_room(self, records: int) -> bool:
        return not self._handled or self._handled + records <= RECORDS

    def _next_turn(self) -> None:
        self._handled = 0
        while self._waiting and self._has_room(self._waiting[0][1]):
            turn, records = self._waiting.popleft()
            if not turn.done():  # or cancelled
                turn.set_result(None)
                self.after(records)
