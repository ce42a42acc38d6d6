"""Where a consumer group will begin to read, and how many records it has to read: a new group id reads everything again."""

import asyncio
import logging
from collections.abc import Collection, Mapping
from typing import Final, NamedTuple

from aiokafka import TopicPartition

from worker.core.timestamps import iso_time
from worker.core.topic_ids import is_of
from worker.kafka.aiokafka_compat.metadata import partitions_of, use_topics
from worker.kafka.clients import stop_client
from worker.kafka.connection import UNREACHABLE, Connection
from worker.kafka.consumer import Consumer
from worker.printable import counted

log = logging.getLogger(__name__)

ASK_S: Final = 3.0  # a start does not wait longer for a line in the log
STOP_S: Final = 1.0


class Backlog(NamedTuple):
    """How many partitions have a committed offset (``known``), and how many have none (``new``).

    ``behind`` are the unread records of the first, ``unread`` those of the others.
    """

    group_id: str
    auto_offset_reset: str
    known: int
    behind: int
    new: int
    unread: int
    recreated: tuple[str, ...] = ()
    """Topics that were deleted and created again since the group committed there."""
    since_ms: int | None = None
    """The time at which a group without an offset begins, in ms since 1970; None where ``auto_offset_reset`` says where."""

    @property
    def is_all_over_again(self) -> bool:
        """Whether partitions without a committed offset hold records, and nobody has said that they are to be read."""
        return self.new > 0 and self.unread > 0 and self.since_ms is None

    def __str__(self) -> str:
        parts = []
        if self.recreated:
            topics = ", ".join(self.recreated)
            parts.append(f"has offsets that count as none, for {topics} was deleted and created again since")
        if self.known:
            parts.append(f"goes on from its committed offsets: {_records_in(self.behind, self.known)}")
        if self.new:
            where = f" of {counted(self.new, 'other partition')}" if self.known else ""
            records = counted(self.unread, "record") if where else _records_in(self.unread, self.new)
            begin, skips = f"at the {self.auto_offset_reset}", ""
            if self.since_ms is not None:
                begin = f"at the first record of {iso_time(self.since_ms)} or later"
            elif self.auto_offset_reset == "latest":
                skips = " that are skipped"
            parts.append(f"has no committed offset{where}: it begins {begin}, {records}{skips}")
        return f"group {self.group_id} {'; it '.join(parts)}"


def _records_in(records: int, partitions: int) -> str:
    return f"{counted(records, 'record')} in {counted(partitions, 'partition')}"


async def backlog(
    connection: Connection,
    topics: Collection[str],
    *,
    group_id: str,
    auto_offset_reset: str,
    isolation_level: str,
    since_ms: int | None = None,
) -> Backlog:
    """What the group has still to read. Joins no group and commits nothing.

    Raises what is in UNREACHABLE, at the latest after a request's timeout and STOP_S.
    """
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
            since = begins if since_ms is None else await offsets_since(consumer, since_ms, ends)
    finally:
        await stop_client(consumer, "consumer", STOP_S)
    new = begins.keys() - committed.keys()
    behind = sum(max(0, ends[tp] - max(offset, begins[tp])) for tp, offset in committed.items())
    unread = sum(max(0, ends[tp] - since[tp]) for tp in new)
    return Backlog(group_id, auto_offset_reset, len(committed), behind, len(new), unread, recreated, since_ms)


async def offsets_since(
    consumer: Consumer, since_ms: int, ends: Mapping[TopicPartition, int]
) -> dict[TopicPartition, int]:
    """Each partition's first offset that is dated ``since_ms`` or later, else its end. Raises what is in UNREACHABLE."""
    found = await consumer.offsets_for_times(dict.fromkeys(ends, since_ms))
    return {tp: int(found[tp].offset if found[tp] else end) for tp, end in ends.items()}


async def valid_offsets(
    consumer: Consumer, tps: Collection[TopicPartition]
) -> tuple[dict[TopicPartition, int], tuple[str, ...]]:
    """The group's committed offsets, without those of deleted topics, and the names of topics created again since.

    Raises what is in UNREACHABLE. Waits for the group's coordinator without end, so the caller sets a deadline.
    """
    ids = await consumer.topic_ids({tp.topic for tp in tps})
    commits = {tp: commit for tp, commit in (await consumer.committed_offsets(tps)).items() if commit.offset >= 0}
    valid = {tp: commit.offset for tp, commit in commits.items() if is_of(ids.get(tp.topic, ""), commit.metadata)}
    return valid, tuple(sorted({tp.topic for tp in commits.keys() - valid.keys()}))


async def log_backlog(
    connection: Connection,
    topics: Collection[str],
    *,
    group_id: str,
    auto_offset_reset: str,
    isolation_level: str,
    since_ms: int | None,
) -> None:
    """Logs where the group will begin, so that a mistaken group id is noticed. Raises nothing.

    Waits for the answer at most ASK_S; closing the connections may take STOP_S more.
    """
    try:
        async with asyncio.timeout(ASK_S):
            unread = await backlog(
                connection,
                topics,
                group_id=group_id,
                auto_offset_reset=auto_offset_reset,
                isolation_level=isolation_level,
                since_ms=since_ms,
            )
    except UNREACHABLE as error:
        log.info("the brokers do not answer where the group will begin", extra={"error": type(error).__name__})
    else:
        log.info("%s", unread)
