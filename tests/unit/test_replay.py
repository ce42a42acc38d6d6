"""A replay at the edges that no broker brings about."""

import asyncio
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import IllegalStateError
from rich.progress import Progress

from worker.events import Original
from worker.replay import Lane, Replay, ReplayFailed
from worker.replayed import Replayed
from worker.settings import ReplaySettings, load

LETTER = Original("gone", 0, 7, 0, b"k", b"{", [], "invalid_json", True)


async def test_a_signal_ends_the_wait_for_a_topic_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = asyncio.Event()

    async def for_ever(*_: Any, **__: Any) -> None:
        waiting.set()
        await asyncio.Event().wait()

    monkeypatch.setattr("worker.replay.wait_until_usable", for_ever)
    replay = Replay(load(ReplaySettings, [], "replay", {}), Progress(disable=True))
    sending = asyncio.create_task(replay._send([LETTER]))
    await asyncio.wait_for(waiting.wait(), 5)
    replay._stop.set()
    with pytest.raises(ReplayFailed, match="before gone could be used"):
        await asyncio.wait_for(sending, 5)


async def test_a_partition_that_is_revoked_as_it_is_begun_is_begun_when_it_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replay = Replay(load(ReplaySettings, [], "replay", {}), Progress(disable=True))
    tp = TopicPartition("dead", 0)
    lane = replay._lanes[tp] = Lane(Replayed(3), 3, 5)
    sought: list[int] = []
    assigned: set[TopicPartition] = set()

    def seek(_: TopicPartition, offset: int) -> None:
        if tp not in assigned:
            raise IllegalStateError("no partition of this consumer's")
        sought.append(offset)

    async def read(*_: Any) -> tuple[list[Any], int]:
        return [], 5

    async def settle(*_: Any) -> None:
        lane.next = 5

    monkeypatch.setattr(replay._consumer, "seek", seek)
    monkeypatch.setattr(replay, "_read", read)
    monkeypatch.setattr(replay, "_settle", settle)
    going = asyncio.create_task(replay._go_through(tp, lane))
    await asyncio.sleep(0)
    assert not going.done()
    assigned.add(tp)
    await replay.on_assigned(assigned)
    await asyncio.wait_for(going, 5)
    assert sought == [3]
