"""Where a consumer group will begin to read, and how many records it has to read: a new group id reads everything again."""

import asyncio
import logging
from collections.abc import Collection
from typing import Final, NamedTuple

from aiokafka import TopicPartition

from worker.core.topic_ids import is_of
from worker.kafka.aiokafka_compat.topics import partitions_of, use_topics
from worker.kafka.clients import stop_client
from worker.kafka.connection import UNREACHABLE, Connection
from worker.kafka.consumer import Consumer

log = logging.getLogger(__name__)

TELL_S: Final = 3.0  # a start does not ask longer for what is only told
STOP_S: Final = 1.0


class Backlog(NamedTuple):
    """Partitions with a committed offset (``known``) and without (``new``); their unread records: ``behind``, ``unread``."""

    group_id: str
    auto_offset_reset: str
    known: int
    behind: int
    new: int
    unread: int
    recreated: tuple[str, ...] = ()
    """Topics that were deleted and made again since the group committed there."""

    @property
    def is_all_over_again(self) -> bool:
        """Whether partitions without a committed offset hold records."""
        return self.new > 0 and self.unread > 0

    def __str__(self) -> str:
        parts = []
        if self.recreated:
            topics = ", ".join(self.recreated)
            parts.append(f"has offsets that count as none, for {topics} was deleted and made again since")
        if self.known:
            parts.append(f"goes on from its committed offsets: {self.behind:,} records in {self.known} partitions")
        if self.new:
            where = f" of {self.new} other partitions" if self.known else ""
            records = f"{self.unread:,} records" + ("" if where else f" in {self.new} partitions")
            skips = " that are skipped" if self.auto_offset_reset == "latest" else ""
            parts.append(f"has no committed offset{where}: it begins at the {self.auto_offset_reset}, {records}{skips}")
        return f"group {self.group_id} {'; it '.join(parts)}"


async def backlog(
    connection: Connection, topics: Collection[str], *, group_id: str, auto_offset_reset: str, isolation_level: str
) -> Backlog:
    """Joins no group, and commits nothing. Raises what is in UNREACHABLE, within a request's timeout and STOP_S."""
    consumer = Consumer(
        **connection.options(), group_id=group_id, enable_auto_commit=False, isolation_level=isolation_level
    )
    use_topics(consumer, topics)
    try:
        async with asyncio.timeout(connection.request_timeout_s):
            await consumer.start()
            tps = [
                TopicPartition(topic, number)
                for topic in dict.fromkeys(topics)
                for number in await partitions_of(consumer, topic)
            ]
            committed, recreated = await valid_offsets(consumer, tps)
            begins, ends = await consumer.beginning_offsets(tps), await consumer.end_offsets(tps)
    finally:
        await stop_client(consumer, "consumer", STOP_S)
    new = begins.keys() - committed.keys()
    behind = sum(max(0, ends[tp] - max(offset, begins[tp])) for tp, offset in committed.items())
    unread = sum(ends[tp] - begins[tp] for tp in new)
    return Backlog(group_id, auto_offset_reset, len(committed), behind, len(new), unread, recreated)


async def valid_offsets(
    consumer: Consumer, tps: Collection[TopicPartition]
) -> tuple[dict[TopicPartition, int], tuple[str, ...]]:
    """The group's committed offsets, without those of deleted topics; and the topics that have such a one's name.

    Raises what is in UNREACHABLE; bound it, for it waits for the group's coordinator.
    """
    ids = await consumer.topic_ids({tp.topic for tp in tps})
    commits = {tp: commit for tp, commit in (await consumer.committed_offsets(tps)).items() if commit.offset >= 0}
    valid = {tp: commit.offset for tp, commit in commits.items() if is_of(ids.get(tp.topic, ""), commit.metadata)}
    return valid, tuple(sorted({tp.topic for tp in commits.keys() - valid.keys()}))


async def tell_backlog(
    connection: Connection, topics: Collection[str], *, group_id: str, auto_offset_reset: str, isolation_level: str
) -> None:
    """Logs from where the group will begin, so that a group id by mistake shows. Raises nothing.

    Asks for at most TELL_S; closing the connections may take STOP_S more.
    """
    try:
        async with asyncio.timeout(TELL_S):
            found = await backlog(
                connection,
                topics,
                group_id=group_id,
                auto_offset_reset=auto_offset_reset,
                isolation_level=isolation_level,
            )
    except UNREACHABLE as error:
        log.info("where the group will begin cannot be asked now", extra={"error": type(error).__name__})
    else:
        log.info("%s", found)
