"""The aiokafka consumer with which this process is a member of its group: starting, replacing and stopping it."""

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Self

from aiokafka import TopicPartition
from aiokafka.errors import IllegalStateError

from worker.kafka.aiokafka_compat.group import StaticMember, leave_group
from worker.kafka.aiokafka_compat.metadata import use_topics
from worker.kafka.clients import stop_client
from worker.kafka.connection import UNREACHABLE, Connection, unreachable
from worker.kafka.consumer import Consumer
from worker.kafka.decompression import Budget
from worker.kafka.reader import Reader
from worker.kafka.subscription import Subscription
from worker.runtime.backoff import Backoff
from worker.runtime.tasks import cancel_all, within
from worker.telemetry.health import Health
from worker.telemetry.metrics import Metrics

LEAVE_TIMEOUT_S: Final = 1.0  # to stop, before the group is left beside a join, and for that request
POSITION_TIMEOUT_S: Final = 1.0
ENDS_TIMEOUT_S: Final = 3.0  # of a request for the end offsets of partitions
REBALANCE_SHARE: Final = 0.4  # of a request's timeout: as long as the group waits for a member to join again
HEARTBEAT_SHARE: Final = 0.25  # of the rebalance's time, until a heartbeat tells the member of it
REVOKE_SHARE: Final = 0.65  # of the rebalance's time, to finish and commit what is under way; the rest is for the join
LONGEST_POLL_INTERVAL_MS: Final = 2**31 - 1  # no limit: health watches the pipeline, and Kafka's limit would evict us


class Rejoin(Exception):
    """The consumer has to be replaced and the group joined again; the message says why."""


@dataclass(frozen=True, slots=True)
class GroupTimeouts:
    """How long a member of the group may take for what.

    JoinGroup waits in a request for the slowest member: heartbeat + revoke deadline < rebalance timeout < request timeout.
    One that was killed and is back makes all others wait for the whole rebalance timeout.
    """

    session_ms: int
    rebalance_ms: int
    heartbeat_ms: int
    revoke_s: float

    @classmethod
    def of(cls, *, request_timeout_ms: int, session_timeout_ms: int) -> Self:
        rebalance_ms = int(request_timeout_ms * REBALANCE_SHARE)
        heartbeat_ms = min(3_000, session_timeout_ms // 3, int(rebalance_ms * HEARTBEAT_SHARE))
        return cls(session_timeout_ms, rebalance_ms, heartbeat_ms, rebalance_ms / 1000 * REVOKE_SHARE)


class GroupConsumer:
    """Holds at most one consumer at a time, which is live from ``start`` to ``stop``."""

    def __init__(
        self,
        connection: Connection,
        subscription: Subscription,
        *,
        group_id: str,
        group_instance_id: str | None,
        timeouts: GroupTimeouts,
        isolation_level: str,
        client_rack: str | None,
        fetch_max_wait_ms: int,
        max_unpacked_bytes: int,
        metrics: Metrics,
        health: Health,
    ) -> None:
        self._connection = connection
        self._subscription = subscription
        self._group_id = group_id
        self._group_instance_id = group_instance_id
        self._static_member = StaticMember(group_instance_id) if group_instance_id else None
        self._timeouts = timeouts
        self._isolation_level = isolation_level
        self._client_rack = client_rack
        self._fetch_max_wait_ms = fetch_max_wait_ms
        self._unpacking = Budget(max_unpacked_bytes)
        self._metrics = metrics
        self._health = health
        self._consumer: Consumer | None = None
        self._reader: Reader | None = None

    @property
    def is_live(self) -> bool:
        return self._consumer is not None

    @property
    def live(self) -> Consumer:
        """The consumer; raises IllegalStateError where none is running."""
        if self._consumer is None:
            raise IllegalStateError("the consumer is not running")
        return self._consumer

    @property
    def reader(self) -> Reader:
        """Reads the live consumer's partitions; raises IllegalStateError where none is running."""
        if self._consumer is None or self._reader is None:
            raise IllegalStateError("the consumer is not running")
        return self._reader

    async def start(self) -> Consumer:
        """Makes a consumer the live one. Waits for as long as the brokers are away."""
        consumer = await self._started()
        self._consumer, self._reader = consumer, Reader(consumer, self._unpacking)
        return consumer

    async def stop(self, timeout_s: float) -> None:
        """Stops the live consumer, if there is one; it leaves the group, unless it is a static member."""
        consumer, self._consumer = self._consumer, None
        if consumer is None:
            return
        stopping = asyncio.create_task(stop_client(consumer, "consumer", timeout_s))
        try:
            _, waits = await asyncio.wait({stopping}, timeout=LEAVE_TIMEOUT_S)
            if waits:  # for a join, which waits for the slowest member of the group
                with contextlib.suppress(*UNREACHABLE):
                    await leave_group(consumer, LEAVE_TIMEOUT_S)
            await stopping
        finally:
            await cancel_all([stopping])

    def release(self, tp: TopicPartition) -> None:
        """Drops what is unpacked of a partition that nobody reads for now."""
        if self._reader is not None:
            self._reader.release(tp)

    def is_unpacking(self, tp: TopicPartition) -> bool:
        """Whether the partition's reader waits for a large batch to be unpacked, or for room to do it."""
        return self._reader is not None and tp in self._reader.waiting

    async def position(self, tp: TopicPartition) -> int | None:
        """The offset of the record to fetch next; None where it is not known within a second."""
        try:
            position: int = await within(POSITION_TIMEOUT_S, self.live.position(tp))
        except (*UNREACHABLE, IllegalStateError):
            return None
        return position

    async def commit_offsets(self, offsets: Mapping[TopicPartition, tuple[int, str]]) -> None:
        """Commits offsets with their metadata as a member of the group; raises the KafkaError of what fails."""
        await self.live.commit(offsets)

    async def _started(self) -> Consumer:
        backoff = Backoff()
        while True:
            consumer = Consumer(
                **self._connection.options(),
                group_id=self._group_id,
                group_instance_id=self._group_instance_id,
                enable_auto_commit=False,
                auto_offset_reset="none",  # aiokafka would reset in silence
                isolation_level=self._isolation_level,
                client_rack=self._client_rack,
                session_timeout_ms=self._timeouts.session_ms,
                heartbeat_interval_ms=self._timeouts.heartbeat_ms,
                rebalance_timeout_ms=self._timeouts.rebalance_ms,
                max_poll_interval_ms=LONGEST_POLL_INTERVAL_MS,
                fetch_max_wait_ms=self._fetch_max_wait_ms,
            )
            # Without this it asks for the metadata of all topics until it has subscribed.
            use_topics(consumer, self._subscription.topics)
            try:
                await within(self._connection.request_timeout_s, consumer.start())
            except UNREACHABLE as error:
                self._metrics.kafka_errors.labels("connect").inc()
                self._health.failing("kafka", unreachable(self._connection, error))
                await stop_client(consumer, "consumer", 5)
                await backoff.wait()
            except asyncio.CancelledError:
                await stop_client(consumer, "consumer", 5)
                raise
            else:
                self._health.working("kafka")
                if self._static_member:
                    self._static_member.guard(consumer)
                return consumer
