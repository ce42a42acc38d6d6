"""The input topics, to which new ones are added where they match a pattern."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, Final

from aiokafka import ConsumerRebalanceListener, TopicPartition

from worker.kafka.connection import UNREACHABLE
from worker.kafka.consumer import Consumer
from worker.kafka.topics import matching
from worker.runtime.tasks import within

log = logging.getLogger(__name__)

TOPICS_INTERVAL_S: Final = 15.0  # how often a pattern is compared with the cluster's topics, at most
LONGEST_TOPICS_INTERVAL_S: Final = 300.0
TOPICS_SHARE: Final = 200  # or so many times as long as the request took, if that is more: it lists all partitions


class RebalanceListener(ConsumerRebalanceListener):  # type: ignore[misc]
    """aiokafka only logs what a listener raises; here ``fail`` gets it, and ends the session."""

    def __init__(
        self,
        on_revoked: Callable[[set[TopicPartition]], Coroutine[Any, Any, None]],
        on_assigned: Callable[[set[TopicPartition]], Coroutine[Any, Any, None]],
        fail: Callable[[BaseException], None],
    ) -> None:
        self._on_revoked = on_revoked
        self._on_assigned = on_assigned
        self._fail = fail

    async def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        await self._called(self._on_revoked(revoked))

    async def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        await self._called(self._on_assigned(assigned))

    async def _called(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:  # noqa: BLE001 - whatever it is, the session must not go on without it
            self._fail(error)


class Subscription:
    """The topics to subscribe to: ``topics`` and, if there is a ``pattern``, those that come later and match it."""

    def __init__(self, topics: Iterable[str], pattern: str | None, *, request_timeout_s: float) -> None:
        self.topics = tuple(topics)
        self.pattern = pattern
        self._request_timeout_s = request_timeout_s

    def subscribe(self, consumer: Consumer, listener: RebalanceListener) -> None:
        consumer.subscribe(topics=self.topics, listener=listener)

    async def new_topics(self, consumer: Consumer) -> list[str]:
        """Topics that match the pattern and are not subscribed to yet; none without one. Raises what is in UNREACHABLE."""
        if self.pattern is None:
            return []
        names = await within(self._request_timeout_s, consumer.topic_names())
        return [name for name in matching(self.pattern, names) if name not in self.topics]

    async def watch(
        self, consumer: Consumer, listener: RebalanceListener, revoke_all: Callable[[], Awaitable[None]]
    ) -> None:
        """Subscribes to new topics that match the pattern. A deleted one stays subscribed, and may come back.

        aiokafka's own patterns give partitions up before the listener hears of it, which then can commit nothing, and
        lose all topics when a partition's leader is not known. So this revokes all partitions itself and then subscribes.
        """
        took_s = 0.0
        while True:
            await asyncio.sleep(min(max(TOPICS_INTERVAL_S, TOPICS_SHARE * took_s), LONGEST_TOPICS_INTERVAL_S))
            started = time.monotonic()
            try:
                found = await self.new_topics(consumer)
            except UNREACHABLE:
                continue  # the lag watcher reports it
            took_s = time.monotonic() - started
            if found:
                log.info("new topics match input_pattern", extra={"topics": ",".join(found)})
                await revoke_all()
                self.topics = (*self.topics, *found)
                self.subscribe(consumer, listener)
