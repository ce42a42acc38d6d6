"""Which topic an input topic's name stands for: a topic that was deleted and created again has the same name."""

import asyncio
import contextlib
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Final

from aiokafka import TopicPartition
from aiokafka.errors import UnknownTopicOrPartitionError
from aiokafka.structs import OffsetAndMetadata

from worker.core.topic_ids import TopicIds, is_of
from worker.kafka.assignment import Assignments, partition_name
from worker.kafka.connection import UNREACHABLE
from worker.kafka.consumer import Consumer
from worker.kafka.group_consumer import GroupConsumer
from worker.telemetry.health import Health
from worker.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

TOPIC_IDS_INTERVAL_S: Final = 3.0  # how often the ids of input topics are compared
TOPIC_IDS_DOUBT_S: Final = 1.0  # and while one answer had another id, in which time nothing is read


class TopicIdentity:
    """The ids of the input topics, and whether they are certain. Kept as long as the process, over all its consumers."""

    def __init__(
        self,
        consumer: GroupConsumer,
        assignments: Assignments,
        *,
        auto_offset_reset: str,
        metrics: Metrics,
        health: Health,
    ) -> None:
        self._consumer = consumer
        self._assignments = assignments
        self._auto_offset_reset = auto_offset_reset
        self._metrics = metrics
        self._health = health
        self._topic_ids, self._identifying = TopicIds(), asyncio.Lock()
        self._confirming: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._confirmed: Counter[str] = Counter()  # by topic: times that the brokers agreed on the id that is known

    def of(self, topic: str) -> str:
        """The topic's id, empty if the brokers have none."""
        return self._topic_ids.get(topic)

    def ask_again(self, topics: Iterable[str]) -> None:
        """Which topics these are is no longer certain."""
        self._topic_ids.invalidate(topics)

    async def watch(self, consumer: Consumer) -> None:
        """Compares the ids of the topics that are read, until it is cancelled. Raises TopicRecreated.

        Commits until then name the old topic's id, so the next start ignores them.
        """
        while True:
            await asyncio.sleep(TOPIC_IDS_INTERVAL_S)
            topics = {tp.topic for tp in self._assignments}
            with contextlib.suppress(*UNREACHABLE):  # the lag watcher reports it
                self._topic_ids.update(await consumer.topic_ids(topics) if topics else {})

    async def identify(self, tp: TopicPartition, *, anew: bool = False) -> None:
        """Waits until it is certain which topic has this name. One request serves all topics that are read.

        Raises TopicRecreated, and what is in UNREACHABLE.
        """
        topic = tp.topic
        if anew:
            self._topic_ids.invalidate([topic])
        while not self._topic_ids.is_confirmed(topic):
            async with self._identifying:
                if self._topic_ids.is_confirmed(topic):
                    return
                answer = await self._consumer.live.topic_ids({topic, *(tp.topic for tp in self._assignments)})
                self._topic_ids.update(answer)
                if topic not in answer:
                    raise UnknownTopicOrPartitionError  # for a moment
                if not self._topic_ids.is_confirmed(topic):
                    self._report_disagreement(tp)
                    await asyncio.sleep(TOPIC_IDS_DOUBT_S)

    async def confirm(self, tp: TopicPartition) -> None:
        """Waits until the brokers agree that the topic has the id that is known, for one alone may be behind them.

        Raises as ``identify``. Those who wait for one topic share what is asked after they have come.
        """
        topic, lock = tp.topic, self._confirming[tp.topic]
        due = self._confirmed[topic] + (2 if lock.locked() else 1)
        while self._confirmed[topic] < due:
            async with lock:
                if self._confirmed[topic] >= due:
                    return
                await asyncio.sleep(TOPIC_IDS_DOUBT_S)
                agreed = await self._consumer.live.agreed_topic_id(topic)
                if agreed is not None:
                    self._topic_ids.update({topic: agreed})
                if agreed is not None and self._topic_ids.is_confirmed(topic):
                    self._confirmed[topic] += 1
                else:
                    self._report_disagreement(tp)

    def offset_of_this_topic(self, tp: TopicPartition, committed: OffsetAndMetadata) -> int | None:
        """A committed offset; None for none, or for one of another topic, which had this name before."""
        if not is_of(self._topic_ids.get(tp.topic), committed.metadata):
            self._metrics.offset_resets.inc()
            log.warning(
                "the input topic was deleted and created again since this offset was committed: it counts as none"
                + ("; auto_offset_reset=latest skips what is in it" if self._auto_offset_reset == "latest" else ""),
                extra={
                    "partition": partition_name(tp),
                    "offset": committed.offset,
                    "metadata": committed.metadata,
                },
            )
            return None
        return committed.offset if committed.offset >= 0 else None

    def _report_disagreement(self, tp: TopicPartition) -> None:
        self._health.failing("read", f"the brokers do not agree on which topic has the name {tp.topic}", tp)
