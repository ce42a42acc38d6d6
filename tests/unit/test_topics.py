"""What a topic's configuration says of its limits, and how long a topic that is missing is waited for."""

import asyncio
from typing import Any

import pytest

from worker.kafka import topics as module
from worker.kafka.connection import Connection
from worker.kafka.topics import NO_LIMIT, TopicsMissing, _parsed_limits, wait_until_usable
from worker.runtime.backoff import Backoff
from worker.telemetry.health import Health


@pytest.mark.parametrize(
    ("config", "retention_ms"),
    [
        ({}, NO_LIMIT),
        ({"cleanup.policy": "delete", "retention.ms": "604800000"}, 604_800_000),
        ({"cleanup.policy": "compact,delete", "retention.ms": "0"}, 0),
        ({"cleanup.policy": "delete", "retention.ms": "-1"}, NO_LIMIT),
        ({"cleanup.policy": "compact", "retention.ms": "604800000"}, NO_LIMIT),
        (
            {"cleanup.policy": "delete", "retention.ms": "1", "message.timestamp.type": "LogAppendTime"},
            NO_LIMIT,
        ),
    ],
)
def test_retention_is_that_of_topics_that_delete_by_the_producers_time(
    config: dict[str, str | None], retention_ms: int
) -> None:
    assert _parsed_limits(config).retention_ms == retention_ms


class NoTopics:
    """An admin client of brokers that have no topic."""

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def describe_topics(self, names: list[str]) -> list[Any]:
        return []


async def test_a_topic_that_is_missing_is_waited_for_as_long_as_patience_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "admin_client", lambda *_: NoTopics())
    monkeypatch.setattr(Backoff, "wait", lambda _: asyncio.sleep(0))
    health = Health()
    sentence = "role: topic gone does not exist; create it, or name another; waited 0.05 s for it"
    with pytest.raises(TopicsMissing, match=f"^{sentence}$"):
        await wait_until_usable(Connection(("x:1",)), {"role": ["gone"]}, health, patience_s=0.05)
    assert (
        health.why_not_ready() == "topics: role: topic gone does not exist; create it, or name another; waiting for it"
    )
