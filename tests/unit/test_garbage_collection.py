import asyncio
import gc
import weakref
from collections.abc import Callable, Iterator

import pytest

from worker.runtime import garbage_collection as garbage


class Node:
    """One that is in a cycle with itself."""

    def __init__(self) -> None:
        self.itself = self


class Nap:
    """Takes the place of asyncio.sleep. The ``last`` one, of those between searches, does not end."""

    def __init__(self, last: int) -> None:
        self.looks = 0
        self._left = last

    async def __call__(self, seconds: float) -> None:
        self.looks += seconds == garbage.LOOK_S
        self._left -= seconds == garbage.EVERY_S
        if not self._left:
            raise asyncio.CancelledError


@pytest.fixture(autouse=True)
def _python_as_it_was() -> Iterator[None]:
    yield
    gc.enable()


async def searched(monkeypatch: pytest.MonkeyPatch, times: int, is_quiet: Callable[[], bool]) -> int:
    """How often it has looked whether it is quiet, and it was not."""
    nap = Nap(times + 1)
    monkeypatch.setattr("worker.runtime.garbage_collection.asyncio.sleep", nap)
    with pytest.raises(asyncio.CancelledError):
        await garbage.collect(is_quiet)
    return nap.looks


async def test_a_cycle_goes_once_it_is_quiet() -> None:
    moments = iter([False, False, True])
    gone = asyncio.Event()
    gc.disable()  # Python's own search may come before the one that is tested
    weakref.finalize(Node(), gone.set)
    collecting = asyncio.create_task(garbage.collect(lambda: next(moments), every_s=0.001, look_s=0.001))
    await asyncio.wait_for(gone.wait(), 30)
    collecting.cancel()
    assert next(moments, None) is None


async def test_where_it_never_is_it_goes_at_last(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = weakref.ref(Node())
    looks = await searched(monkeypatch, 1, lambda: False)
    assert (looks, lost()) == (garbage.PATIENCE, None)


async def test_everything_is_looked_through_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    generations: list[int] = []
    monkeypatch.setattr("worker.runtime.garbage_collection.gc.collect", generations.append)
    await searched(monkeypatch, 2 * garbage.FULL, lambda: True)
    assert generations == [*[1] * (garbage.FULL - 1), 2] * 2


async def test_meanwhile_python_does_not_search_by_itself() -> None:
    collecting = asyncio.create_task(garbage.collect(lambda: True))
    await asyncio.sleep(0)
    assert not gc.isenabled()
    collecting.cancel()
    await asyncio.wait({collecting})
    assert gc.isenabled()
