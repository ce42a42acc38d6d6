"""Python's search for reference cycles, in moments of few records.

By itself Python searches whenever so many objects have come, which is in the midst of a backlog: it goes through the tens of
thousands that belong to records under way, stops the event loop for 10 to 20 ms, and finds nothing, for records are in no
cycle. Cycles come from what is rare: connections that break, requests, a model that is loaded.
"""

import asyncio
import gc
from typing import Final

EVERY_S: Final = 10.0
LOOK_S: Final = 1.0
PATIENCE: Final = 50  # looks
FEW: Final = 10_000  # objects, of which a search takes some milliseconds


def set_aside() -> None:
    """Searches once more, leaves what is there now out of all later searches, and ends Python's own. Blocks.

    For after a model is loaded: torch brings 400,000 objects, which take a fifth of a second.
    """
    gc.collect()
    gc.freeze()
    gc.disable()


async def collect(*, every_s: float = EVERY_S, look_s: float = LOOK_S, few: int = FEW) -> None:
    """Searches every so many seconds, when few objects are there; where there are always many, a minute later anyway.

    Until cancelled. Objects are counted as those that have come since the last search and have not gone. Before
    ``set_aside``, Python searches by itself.
    """
    while True:
        await asyncio.sleep(every_s)
        if gc.isenabled():
            continue
        for _ in range(PATIENCE):
            if gc.get_count()[0] <= few:
                break
            await asyncio.sleep(look_s)
        gc.collect()
