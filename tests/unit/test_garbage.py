import asyncio
import gc
import weakref
from collections.abc import Iterator

import pytest

from worker import garbage


class Node:
    """One that is in a cycle with itself."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def python_as_it_was() -> Iterator[None]:
    yield
    gc.enable()
    gc.unfreeze()


def cycle() -> "weakref.ref[Node]":
    return weakref.ref(Node())


async def test_a_cycle_goes_in_a_moment_of_few_objects() -> None:
    garbage.set_aside()
    gone = asyncio.Event()
    weakref.finalize(Node(), gone.set)
    collecting = asyncio.create_task(garbage.collect(every_s=0.001, look_s=60))
    await asyncio.wait_for(gone.wait(), 30)
    collecting.cancel()


async def test_where_there_are_always_many_it_goes_at_last(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0

    async def sleep(seconds: float) -> None:
        nonlocal looks
        looks += seconds == garbage.LOOK_S
        if seconds == garbage.EVERY_S and looks:
            raise asyncio.CancelledError

    garbage.set_aside()
    many = [[] for _ in range(garbage.FEW + 1)]  # type: ignore[var-annotated]
    lost = cycle()
    monkeypatch.setattr("worker.garbage.asyncio.sleep", sleep)
    with pytest.raises(asyncio.CancelledError):
        await garbage.collect()
    assert (looks, lost(), len(many)) == (garbage.PATIENCE, None, garbage.FEW + 1)


async def test_what_is_set_aside_is_not_looked_through_again_and_is_freed_all_the_same() -> None:
    kept = Node()
    garbage.set_aside()
    assert gc.get_freeze_count()
    assert not gc.isenabled()
    assert not any(each is kept for each in gc.get_objects())
    lost = weakref.ref(kept)
    kept.itself = None  # type: ignore[assignment]
    del kept
    assert lost() is None


async def test_until_then_python_searches_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    searches = []
    monkeypatch.setattr("worker.garbage.gc.collect", lambda: searches.append(1))
    collecting = asyncio.create_task(garbage.collect(every_s=0))
    for _ in range(100):
        await asyncio.sleep(0)
    assert not searches
    collecting.cancel()
