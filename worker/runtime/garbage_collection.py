"""Python's search for reference cycles, moved to moments when few records are under way.

By itself Python searches after so many new objects, which is in the midst of a backlog: it walks through tens of thousands
of objects that belong to records under way, stops the event loop for 10 to 20 ms, and finds nothing, because records are in
no cycle. Cycles come from what is rare: broken connections, HTTP requests, a partition that is taken away.
"""

import asyncio
import gc
import itertools
from collections.abc import Callable
from typing import Final

EVERY_S: Final = 10.0  # between two searches
LOOK_S: Final = 1.0  # between two looks at whether it is quiet
PATIENCE: Final = 50  # looks, after which a search is made anyway
FULL: Final = 60  # one search in so many goes through all objects, the others only through those that are new


async def collect(is_quiet: Callable[[], bool], *, every_s: float = EVERY_S, look_s: float = LOOK_S) -> None:
    """Searches every ``every_s`` seconds, as soon as ``is_quiet`` says so, and after PATIENCE looks anyway.

    Runs until it is cancelled; meanwhile Python does not search by itself.
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
