"""A replay at the edges that no broker brings about."""

import asyncio
from typing import Any

import pytest
from rich.progress import Progress

from worker.events import Original
from worker.replay import Replay, ReplayFailed
from worker.settings import ReplaySettings, load

LETTER = Original("gone", 0, 7, 0, b"k", b"{", [], "invalid_json", True)


async def test_a_signal_ends_the_wait_for_a_topic_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = asyncio.Event()

    async def for_ever(*_: Any) -> None:
        waiting.set()
        await asyncio.Event().wait()

    monkeypatch.setattr("worker.replay.wait_until_usable", for_ever)
    replay = Replay(load(ReplaySettings, [], "replay", {}), Progress(disable=True))
    sending = asyncio.create_task(replay._send([LETTER]))
    await asyncio.wait_for(waiting.wait(), 5)
    replay._stop.set()
    with pytest.raises(ReplayFailed, match="before gone could be used"):
        await asyncio.wait_for(sending, 5)
