"""What the tests of the source and its parts share."""

import asyncio
import logging
from collections.abc import AsyncIterator

import pytest

from tests.support.source import (
    Clock,
    FakeConsumer,
    FakeDelivery,
)
from worker.kafka import group_health, lag, topic_identity


@pytest.fixture
async def consumer(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeConsumer]:
    monkeypatch.setattr(topic_identity, "TOPIC_IDS_DOUBT_S", 0.02)
    yield FakeConsumer()
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()


@pytest.fixture
def delivery() -> FakeDelivery:
    return FakeDelivery()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Clock:
    """With watchers that look all the time."""
    monkeypatch.setattr(lag, "LAG_INTERVAL_S", 0.005)
    monkeypatch.setattr(group_health, "GROUP_INTERVAL_S", 0.005)
    caplog.set_level(logging.INFO, "worker.telemetry.health")
    return Clock()
