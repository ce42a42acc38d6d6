"""Sends dead letters back to the topics that they came from, each once.

One member of a consumer group of its own reads them to the ends that it saw at its start. What has been published is
committed before more is read, so that a replay may be interrupted and repeated at any moment; only the records that were
being published when the process was killed, or that brokers refused for too long, may come twice.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection, Coroutine, Mapping
from typing import Any, Final, TypeVar

from aiokafka import ConsumerRebalanceListener, ConsumerRecord, TopicPartition
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError
from aiokafka.structs import OffsetAndMetadata

from worker.core.dead_letters import OriginalRecord, read_dead_letter, record_to_replay
from worker.core.decoder import Decoder
from worker.core.replay_progress import PartitionReplay, ProgressTooLarge, ReplayCounts, ReplayProgress
from worker.core.topic_ids import is_of, with_topic_id, without_topic_id
from worker.errors import UserError
from worker.kafka.aiokafka_compat.connections import SILENT_BROKERS_S
from worker.kafka.aiokafka_compat.metadata import partitions_of, use_topics
from worker.kafka.clients import stop_client
from worker.kafka.connection import UNREACHABLE, Connection, error_name, unreachable
from worker.kafka.consumer import Consumer
from worker.kafka.diagnosis import why_unreachable
from worker.kafka.group_consumer import LONGEST_POLL_INTERVAL_MS
from worker.kafka.partition_reader import UNREADABLE
from worker.kafka.permissions import missing_permission
from worker.kafka.producer_records import ProducerRecord
from worker.kafka.sink import Sink
from worker.kafka.topic_identity import TOPIC_IDS_DOUBT_S
from worker.kafka.topics import wait_until_usable
from worker.runtime.backoff import Backoff
from worker.runtime.tasks import cancel_all, within
from worker.telemetry.health import Health

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")

RECORDS_AT_ONCE: Final = 500  # dead letters published and committed together
READ_TIMEOUT_MS: Final = 1_000
SILENCE_S: Final = 3 * SILENT_BROKERS_S  # so long may it take to find brokers that have come back elsewhere
REQUESTS: Final = 2  # that may time out one after the other before brokers count as away
STOP_S: Final = 5.0  # so long may brokers refuse what is under way once the replay is to stop
LOOK_S: Final = 0.5  # how often it looks whether they do
NO_REASON: Final = "(no dead letter)"  # as this version knows them


class ReplayFailed(UserError):
    """The replay cannot go on; what it has done is committed."""

    exit_code = 1


class Replayer(ConsumerRebalanceListener):  # type: ignore[misc]
    """One replay, or a dry run of it, which joins no group, commits nothing and sends nothing.

    Make it inside a running event loop. It is its own listener in the group. Empty ``reasons`` stand for all; ``since_ms``
    and ``until_ms`` bound the times at which the dead letters were written. The caller sets ``stop`` for an early end,
    after the records that are being published. ``tell`` is called with the offsets passed, and how many there are in all.
    """

    def __init__(
        self,
        connection: Connection,
        sink: Sink,
        health: Health,
        *,
        topic: str,
        group_id: str,
        reasons: Collection[str],
        since_ms: int | None,
        until_ms: int | None,
        is_dry: bool,
        decoder: Decoder,
        stop: asyncio.Event,
        tell: Callable[[int, int], None],
    ) -> None:
        self._connection = connection
        self._patience_s = REQUESTS * connection.request_timeout_s
        self._topic = topic
        self._group_id = group_id
        self._reasons = frozenset(reasons)
        self._since_ms = since_ms
        self._until_ms = until_ms
        self._is_dry = is_dry
        self._decoder = decoder
        self._health = health
        self._stop = stop
        self._tell = tell
        self._sink = sink
        self._consumer = _consumer(connection, topic, group_id)
        self._topic_id = ""  # of the dead letters: progress in an earlier topic of the same name counts for nothing
        self._partitions: dict[TopicPartition, PartitionReplay] = {}
        self._usable_topics: set[str] = set()
        self._total = 0  # offsets to go through
        self._counts = ReplayCounts()
        self._owned: set[TopicPartition] = set()
        self._assigned = asyncio.Event()
        self._publishing = asyncio.Lock()  # from when records are sent until they are committed

    async def run(self) -> ReplayCounts:
        """Goes through all partitions, and ends early when ``stop`` is set.

        Raises ReplayFailed, WrongSetting, BrokersAway and TopicsMissing.
        """
        await self._wait_until_usable("dead_letter_topic", [self._topic])
        try:
            await _unless_stopped(self._stop, self._start())
            if self._stop.is_set():
                raise ReplayFailed("the replay was stopped before it had begun")
            for tp, partition in self._partitions.items():
                await self._replay_partition(tp, partition)
        except UNREACHABLE as error:
            why = missing_permission(error, "READ")
            why = why or unreachable(self._connection, error, await why_unreachable(self._connection))
            raise ReplayFailed(f"{why}; the next replay goes on where this one was") from error
        finally:
            await stop_client(self._consumer, "consumer", 10)
        self._counts.left = self._left()
        return self._counts

    def _left(self) -> int:
        return sum(partition.left for partition in self._partitions.values())

    # Which records.

    async def _start(self) -> None:
        timeout_s = self._connection.request_timeout_s
        await within(timeout_s, self._consumer.start())
        self._topic_id = await within(timeout_s, self._agreed_id())
        partitions = await within(timeout_s, partitions_of(self._consumer, self._topic))
        tps = [TopicPartition(self._topic, number) for number in sorted(partitions)]
        if self._is_dry:
            self._consumer.assign(tps)
        else:
            await self._join(tps)
        self._partitions = await within(timeout_s, self._plan(tps))
        self._total = self._left()
        self._tell(0, self._total)

    async def _join(self, tps: Collection[TopicPartition]) -> None:
        """All partitions have to be this process's: with fewer, another replay has the rest."""
        self._consumer.subscribe([self._topic], listener=self)
        await within(self._connection.request_timeout_s, self._until_assigned())
        if self._owned != set(tps):
            raise ReplayFailed(f"another replay is running in the group {self._group_id}; wait for it to end")

    async def _until_assigned(self) -> None:
        """Waits for the group's partitions, so the caller sets a deadline. Raises the group's KafkaError."""
        await self._consumer.raise_group_error(self._topic)
        await self._assigned.wait()

    async def _plan(self, tps: list[TopicPartition]) -> dict[TopicPartition, PartitionReplay]:
        begins, ends = await self._consumer.beginning_offsets(tps), await self._consumer.end_offsets(tps)
        since = await self._offsets_at(self._since_ms, tps, ends)
        until = await self._offsets_at(self._until_ms, tps, ends)
        progress = await self._progress(tps)
        partitions = {}
        for tp in tps:
            done = progress[tp]
            done.forget_before(begins[tp])
            end = ends[tp] if self._until_ms is None else min(ends[tp], until[tp])
            begin = max(done.offset, begins[tp] if self._since_ms is None else since[tp])
            partitions[tp] = PartitionReplay(done, min(begin, end), end)
        return partitions

    async def _offsets_at(
        self, moment_ms: int | None, tps: list[TopicPartition], ends: Mapping[TopicPartition, int]
    ) -> dict[TopicPartition, int]:
        """The first offset of a dead letter that was written then or later."""
        if moment_ms is None:
            return {}
        offsets = await self._consumer.offsets_for_times(dict.fromkeys(tps, max(0, moment_ms)))
        return {tp: offsets[tp].offset if offsets.get(tp) else ends[tp] for tp in tps}

    async def _progress(self, tps: list[TopicPartition]) -> dict[TopicPartition, ReplayProgress]:
        commits = await self._consumer.committed_offsets(tps)
        if not all(is_of(self._topic_id, commit.metadata) for commit in commits.values()):
            await asyncio.sleep(TOPIC_IDS_DOUBT_S)
            self._topic_id = await self._agreed_id()
        return {tp: self._progress_of(commits[tp]) for tp in tps}

    async def _agreed_id(self) -> str:
        """The topic's id, on which the brokers have to agree: with another id all dead letters would be sent again."""
        topic_id = await self._consumer.agreed_topic_id(self._topic)
        if topic_id is None or topic_id != (self._topic_id or topic_id):
            raise ReplayFailed(f"the brokers do not agree on which topic has the name {self._topic}; try again later")
        return topic_id

    def _progress_of(self, commit: OffsetAndMetadata) -> ReplayProgress:
        _, state = without_topic_id(commit.metadata)
        if not is_of(self._topic_id, commit.metadata):
            log.warning("the topic %s was deleted and created again: all of it is replayed", self._topic)
            return ReplayProgress(0)
        return ReplayProgress.read(max(0, commit.offset), state)

    # Through one partition.

    async def _replay_partition(self, tp: TopicPartition, partition: PartitionReplay) -> None:
        # Where the partition was revoked just now, on_partitions_assigned seeks when it comes back.
        with contextlib.suppress(IllegalStateError):
            self._consumer.seek(tp, partition.next)
        heard_at = time.monotonic()
        while partition.next < partition.end and not self._stop.is_set():
            if tp not in self._owned and not self._is_dry:
                await _unless_stopped(self._stop, within(SILENCE_S, self._until_assigned()))
            records, reached = await self._read(tp, partition)
            if reached > partition.next:
                heard_at = time.monotonic()
                async with self._publishing:
                    await self._finish(tp, partition, records, min(reached, partition.end))
            elif time.monotonic() - heard_at > SILENCE_S:
                raise ReplayFailed(
                    f"Kafka has sent nothing of the topic {self._topic} for {SILENCE_S:g} s; try again later"
                )

    async def _read(self, tp: TopicPartition, partition: PartitionReplay) -> tuple[list[ConsumerRecord], int]:
        """Some dead letters, and the offset after them; the ends of transactions take up offsets and hold none."""
        try:
            fetched = await self._consumer.getmany(tp, timeout_ms=READ_TIMEOUT_MS, max_records=RECORDS_AT_ONCE)
            records = [record for record in fetched.get(tp, ()) if partition.next <= record.offset < partition.end]
            if records:
                return records, records[-1].offset + 1
            return [], await within(READ_TIMEOUT_MS / 1000, self._consumer.position(tp))
        except (IllegalStateError, TimeoutError):  # the group is rebalancing
            return [], partition.next
        except UNREADABLE as error:
            raise ReplayFailed(
                f"the dead letter of {tp.topic}-{tp.partition} at offset {partition.next}, or one behind it, cannot be "
                f"read ({type(error).__name__})"
            ) from error

    async def _finish(
        self, tp: TopicPartition, partition: PartitionReplay, letters: list[ConsumerRecord], reached: int
    ) -> None:
        """Publishes those of the dead letters that are to be sent, and commits that all before ``reached`` are done."""
        due, kept_back = self._select(partition, letters)
        partition.done.add(partition.next, reached, self._reasons, kept_back)
        if self._is_dry:
            self._counts.sent.update(record.reason for record in due)
        else:
            metadata = self._metadata(partition.done)  # before anything is sent, for it may not fit into a commit
            await self._send(due)
            await self._unless_failing(self._commit({tp: (partition.done.offset, metadata)}))
        partition.next = reached
        self._tell(self._total - self._left(), self._total)

    def _select(
        self, partition: PartitionReplay, letters: list[ConsumerRecord]
    ) -> tuple[list[OriginalRecord], list[int]]:
        """The records to publish, and the offsets of those that are not recognised, which may be of any reason."""
        due, kept_back = [], []
        for letter in letters:
            record = read_dead_letter(letter)
            reason = record.reason if record else NO_REASON
            if record and self._reasons and reason not in self._reasons:
                continue
            if partition.done.has(letter.offset, reason):
                self._counts.done_before += 1
            elif record is None:
                kept_back.append(letter.offset)
                self._counts.kept_back[reason] += 1
                where = f"{letter.topic}-{letter.partition} at offset {letter.offset}"
                self._counts.first_kept_back = self._counts.first_kept_back or where
            elif record.is_whole and (record.key is not None or record.value is not None):
                due.append(record)
            else:
                self._counts.not_kept[reason] += 1
        return due, kept_back

    async def _send(self, due: list[OriginalRecord]) -> None:
        missing = {record.topic for record in due} - self._usable_topics
        if missing:
            await self._wait_until_usable("source.topic", sorted(missing))
            if self._stop.is_set():
                raise ReplayFailed(
                    f"stopped before {', '.join(sorted(missing))} could be used; the next replay goes on there"
                )
            self._usable_topics |= missing
        producer_records = [
            ProducerRecord(record.topic, record_to_replay(record, self._decoder.id_of(record)), record.partition)
            for record in due
        ]
        for record, refusal in zip(due, await self._unless_failing(self._sink.publish(producer_records)), strict=True):
            (self._counts.refused if refusal else self._counts.sent)[record.reason] += 1

    def _metadata(self, done: ReplayProgress) -> str:
        try:
            return with_topic_id(self._topic_id, done.metadata())
        except ProgressTooLarge:
            raise ReplayFailed(
                f"the group {self._group_id} cannot remember so many gaps in what it has replayed; replay all dead "
                "letters. Where the gaps are records that are no dead letters, replay only newer ones (since) with another "
                "replay_group_id"
            ) from None

    async def _commit(self, commit: dict[TopicPartition, tuple[int, str]]) -> None:
        backoff = Backoff()
        while True:
            try:
                await within(self._connection.request_timeout_s, self._consumer.commit(commit))
            except (CommitFailedError, IllegalStateError):
                raise ReplayFailed(
                    f"the group {self._group_id} has taken the topic {self._topic} from this replay; up to "
                    f"{RECORDS_AT_ONCE} dead letters may be replayed twice"
                ) from None
            except (KafkaError, OSError, TimeoutError) as error:
                why = missing_permission(error, "READ") or error_name(error)
                self._health.failing("commit", f"cannot commit what is replayed: {why}")
                await backoff.wait()
            else:
                self._health.working("commit")
                return

    # The group.

    async def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        """Waits until the records that are being published are committed, so that nobody else sends them again."""
        async with self._publishing:
            self._owned = set()
            self._assigned.clear()

    async def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        for tp in assigned & self._partitions.keys():
            self._consumer.seek(tp, self._partitions[tp].next)
        self._owned = set(assigned)
        self._assigned.set()

    async def _wait_until_usable(self, role: str, topics: list[str]) -> None:
        """Waits for topics, or for ``stop``; as long as for brokers, for a name may be wrong."""
        await _unless_stopped(
            self._stop, wait_until_usable(self._connection, {role: topics}, self._health, patience_s=self._patience_s)
        )

    async def _unless_failing(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        """What ``work`` returns, which tells health while it fails, and would try again without end.

        Raises ReplayFailed where it fails for as long as brokers may be away, or for STOP_S once ``stop`` is set.
        """
        working = asyncio.create_task(work)
        healthy_at = time.monotonic()
        try:
            while not (await asyncio.wait({working}, timeout=LOOK_S))[0]:
                why = self._health.why_not_ready()
                if why is None:
                    healthy_at = time.monotonic()
                elif time.monotonic() - healthy_at > (STOP_S if self._stop.is_set() else self._patience_s):
                    raise ReplayFailed(
                        f"{why}; the next replay goes on there, and may send up to {RECORDS_AT_ONCE} dead letters again"
                    )
            return working.result()
        finally:
            await cancel_all([working])


async def _unless_stopped(stop: asyncio.Event, work: Coroutine[Any, Any, object]) -> None:
    """Waits for ``work``, which is cancelled when ``stop`` is set first."""
    waiting = [asyncio.create_task(work), asyncio.create_task(stop.wait())]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if waiting[0].done():
            waiting[0].result()
    finally:
        await cancel_all(waiting)


def _consumer(connection: Connection, topic: str, group_id: str) -> Consumer:
    consumer = Consumer(
        **connection.options(),
        group_id=group_id,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
        max_poll_interval_ms=LONGEST_POLL_INTERVAL_MS,
    )
    use_topics(consumer, [topic])
    return consumer
