"""Python's search for reference cycles, in moments of few records.

By itself Python searches whenever so many objects have come, which is in the midst of a backlog: it goes through the tens of
thousands that belong to records under way, stops the event loop for 10 to 20 ms, and finds nothing, for records are in no
cycle. Cycles come from what is rare: connections that break, requests, a partition that is taken away.
"""

import asyncio
import gc
import itertools
from collections.abc import Callable
from typing import Final

EVERY_S: Final = 10.0
LOOK_S: Final = 1.0
PATIENCE: Final = 50  # looks
FULL: Final = 60  # every so many searches everything is looked through, and not only what is new since the last


async def collect(is_quiet: Callable[[], bool], *, every_s: float = EVERY_S, look_s: float = LOOK_S) -> None:
    """Searches every so many seconds, once it is quiet; where it never is, a minute later anyway.

    Until cancelled; so long Python does not search by itself.
    """
    gc.disable()
    try:
        for search in itertools.count(1):
            await asyncio.sleep(every_s)
            for _ in range(PATIENCE):
                if is_quiet():
                    break
                await asyncio.sleep(look_s)
            gc.collect(2 if search % FULL == 0 else 1)
    finally:
        gc.enable()
