"""Serves a run with the setting ``until``: finds where each partition ends, and when the group has read all of them."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Mapping
from typing import Final

from aiokafka import TopicPartition
from aiokafka.errors import IllegalStateError
from aiokafka.structs import OffsetAndMetadata

from worker.core.bounds import Bound, bound_in, ends_in
from worker.core.timestamps import iso_time
from worker.core.topic_ids import is_of
from worker.errors import WrongSetting
from worker.kafka.aiokafka_compat.group import RETRY_S
from worker.kafka.aiokafka_compat.metadata import partitions_of, refresh_metadata, use_topics
from worker.kafka.aiokafka_compat.offsets import READ_UNCOMMITTED
from worker.kafka.assignment import Assignments
from worker.kafka.clients import stop_client
from worker.kafka.connection import UNREACHABLE, Connection, unreachable
from worker.kafka.consumer import Consumer
from worker.kafka.group_consumer import GroupConsumer
from worker.kafka.permissions import missing_permission
from worker.kafka.subscription import Subscription
from worker.runtime.backoff import Backoff
from worker.runtime.tasks import within
from worker.telemetry.health import Health

FINISHED_INTERVAL_S: Final = 1.0  # between two questions of a worker that is done whether the others are done, too
STOP_S: Final = 1.0


class Until:
    """The setting ``until`` of one group.

    ``time_ms`` is its time in ms since 1970. For ``now`` it is None until the group has committed what time that is.
    ``finished`` is set once the group has read all its partitions to their ends.
    """

    def __init__(self, group_id: str, time_ms: int | None, clock: Callable[[], float] = time.time) -> None:
        self.group_id = group_id
        self.time_ms = time_ms
        self._is_now = time_ms is None
        self.finished = asyncio.Event()
        self.clock = clock

    def check(self, commits: Collection[OffsetAndMetadata]) -> None:
        """Raises WrongSetting if any of these commits of the group was made without ``until``, or with another time.

        If ``time_ms`` is None, it becomes the time in these commits.
        """
        commits = [commit for commit in commits if commit.offset >= 0]
        if any(bound_in(commit.metadata) is None for commit in commits):
            raise WrongSetting(
                f"group_id {self.group_id} has offsets of workers without until; until needs a group_id of its own, which "
                "no other worker uses"
            )
        ends = ends_in(commit.metadata for commit in commits)
        if self._is_now:
            self.time_ms = self.time_ms or min(ends, default=None)
        elif others := ends - {self.time_ms}:
            raise WrongSetting(
                f"group_id {self.group_id} has offsets of a run until {iso_time(min(others))}, and until says another time; "
                "set until to that time, or take a new group_id"
            )


async def check_group(connection: Connection, topics: Collection[str], until: Until, health: Health) -> None:
    """Raises WrongSetting if another run has committed offsets of the group. Waits for brokers; joins no group."""
    backoff = Backoff()
    while True:
        consumer = Consumer(**connection.options(), group_id=until.group_id, enable_auto_commit=False)
        use_topics(consumer, topics)
        try:
            async with asyncio.timeout(connection.request_timeout_s):
                await consumer.start()
                commits = await consumer.committed_offsets(await _partitions(consumer, topics))
        except UNREACHABLE as error:
            health.failing("kafka", missing_permission(error, "READ") or unreachable(connection, error), "until")
        else:
            health.working("kafka", "until")
            until.check(commits.values())
            return
        finally:
            await stop_client(consumer, "consumer", STOP_S)
        await backoff.wait()


class BoundedRun:
    """Says where partitions end, and notices when the run is done. The source of records calls it.

    The worker that reads a partition first finds the partition's bound. Each commit of the partition has it in its
    metadata. If ``until`` is now, the worker that reads the group's first partition commits what time that is, and all
    others wait for that commit.
    """

    def __init__(
        self,
        until: Until,
        consumer: GroupConsumer,
        subscription: Subscription,
        assignments: Assignments,
        request_timeout_s: float,
    ) -> None:
        self._until = until
        self._consumer = consumer
        self._subscription = subscription
        self._assignments = assignments
        self._request_timeout_s = request_timeout_s
        self._asking = asyncio.Lock()

    async def bound(self, tp: TopicPartition, commit: OffsetAndMetadata | None) -> Bound:
        """The bound in a partition's committed offset, or else a new one.

        If ``until`` is now, it waits until the group has committed what time that is. Raises WrongSetting, IllegalStateError
        and the errors in UNREACHABLE.
        """
        if commit is not None:
            self._until.check([commit])
            if bound := bound_in(commit.metadata):
                return bound
        time_ms = await self._time_ms(tp)
        # Records of open transactions count: their timestamps may be before ``until``, and their commit after it.
        ends = await self._consumer.live.ends([tp], self._request_timeout_s, isolation_level=READ_UNCOMMITTED)
        if isinstance(end := ends[tp], Exception):
            raise end
        return Bound(time_ms, end)

    async def watch(self) -> None:
        """Sets ``finished`` once every partition of the group is committed up to its bound. Runs until it is cancelled.

        Raises WrongSetting where others have committed in the group that are not of this run.
        """
        while True:
            await asyncio.sleep(FINISHED_INTERVAL_S)
            if not all(assignment.is_finished() for assignment in self._assignments.values()):
                continue
            with contextlib.suppress(*UNREACHABLE, IllegalStateError):  # the lag watcher reports it
                if await self._is_done():
                    self._until.finished.set()

    async def _time_ms(self, tp: TopicPartition) -> int:
        if self._until.time_ms is None and tp == min(partitions := await self._all_partitions()):
            await self._ask(partitions)
            # It becomes the group's time with the commit; until then, the next reader of this partition may set another one.
            return self._until.time_ms or int(self._until.clock() * 1000)
        async with self._asking:
            while self._until.time_ms is None:
                await self._ask(await self._all_partitions())
                await asyncio.sleep(RETRY_S)
        return self._until.time_ms

    async def _ask(self, partitions: list[TopicPartition]) -> None:
        self._until.check((await self._commits(partitions)).values())

    async def _is_done(self) -> bool:
        """Whether all partitions are committed up to their bounds, and none has come since these were looked at."""
        partitions = await self._all_partitions()
        return (
            await within(self._request_timeout_s, self._are_finished(partitions))
            and not await self._new_topics()
            and await self._all_partitions() == partitions  # also of topics that were subscribed to meanwhile
        )

    async def _are_finished(self, partitions: list[TopicPartition]) -> bool:
        ids = await self._consumer.live.topic_ids({tp.topic for tp in partitions})
        commits = await self._commits(partitions)
        self._until.check(commits.values())
        return all(
            (bound := bound_in(commit.metadata)) is not None
            and bound.is_reached(commit.offset)
            and is_of(ids.get(tp.topic, ""), commit.metadata)
            for tp, commit in commits.items()
        )

    async def _new_topics(self) -> list[str]:
        """Topics that are not subscribed to yet. It asks for all metadata anew: else this member knows in minutes."""
        async with asyncio.timeout(self._request_timeout_s):
            await refresh_metadata(self._consumer.live)
            return await self._subscription.new_topics(self._consumer.live)

    async def _all_partitions(self) -> list[TopicPartition]:
        topics = self._subscription.topics
        return await within(self._request_timeout_s, _partitions(self._consumer.live, topics))

    async def _commits(self, partitions: list[TopicPartition]) -> Mapping[TopicPartition, OffsetAndMetadata]:
        """The offsets that are committed for certain; those in an open transaction do not count yet."""
        return await within(self._request_timeout_s, self._consumer.live.committed_offsets(partitions))


async def _partitions(consumer: Consumer, topics: Collection[str]) -> list[TopicPartition]:
    """All partitions of these topics. Waits without end for a topic that does not exist, so the caller sets a deadline."""
    return [TopicPartition(topic, number) for topic in topics for number in await partitions_of(consumer, topic)]
