"""New topics that match a pattern."""

import asyncio
from types import SimpleNamespace

import pytest

from tests.support.source import (
    TP,
    FakeConsumer,
    staged,
    until,
)
from worker.errors import WrongSetting


async def test_a_session_ends_for_its_reason_while_its_pattern_gives_partitions_up(
    consumer: FakeConsumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.kafka.subscription.TOPICS_INTERVAL_S", 0.0)
    begun = asyncio.Event()

    async def topic_names() -> list[str]:
        return ["t", "t2"] if begun.is_set() else ["t"]

    monkeypatch.setattr(consumer, "topic_names", topic_names, raising=False)
    stage = await staged(consumer, pattern="t.*")
    await stage.assign(TP)
    chunks = await stage.take()
    begun.set()
    await until(lambda: not chunks[0][0].accepts)
    stage.source._fail(WrongSetting("no"))
    await asyncio.sleep(0.01)
    stage.acknowledge(chunks)
    with pytest.raises(WrongSetting, match="no"):
        await asyncio.wait_for(stage.run, 30)
    assert consumer.commits == [{TP: chunks[0][1][-1].offset + 1}]


async def test_names_of_all_topics_are_asked_for_the_more_rarely_the_longer_they_take(
    consumer: FakeConsumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.kafka.subscription.TOPICS_INTERVAL_S", 0.0)
    looks, now = 0, 0.0
    monkeypatch.setattr("worker.kafka.subscription.time", SimpleNamespace(monotonic=lambda: now))

    async def topic_names() -> list[str]:
        nonlocal looks, now
        looks += 1
        now += 0.02 if looks == 10 else 0
        return ["t"]

    monkeypatch.setattr(consumer, "topic_names", topic_names, raising=False)
    stage = await staged(consumer, pattern="t.*")
    await until(lambda: looks == 10)
    await asyncio.sleep(0.5)
    assert looks == 10, "the next one is due after four seconds"
    stage.run.cancel()
