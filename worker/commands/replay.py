"""Dead letters back to the topics that they came from, each once: `sentiment-worker replay`.

One member of a consumer group of its own reads them to the ends that it saw at its start. What has been published is
committed before more is read, so that a replay may be interrupted and repeated at any moment; only what was under way when
the process was killed may come twice.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Collection, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from aiokafka import ConsumerRebalanceListener, ConsumerRecord, TopicPartition
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError
from aiokafka.structs import OffsetAndMetadata
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from worker.commands.kafka_connection import kafka_connection
from worker.core.dead_letters import OriginalRecord, read_dead_letter, record_to_replay
from worker.core.decoder import Decoder
from worker.core.replay_progress import ProgressTooLarge, ReplayProgress
from worker.core.topic_ids import is_of, with_topic_id, without_topic_id
from worker.errors import UserError
from worker.kafka.aiokafka_compat.connections import SILENT_BROKERS_S
from worker.kafka.aiokafka_compat.metadata import partitions_of, use_topics
from worker.kafka.clients import stop_client
from worker.kafka.connection import UNREACHABLE, Backoff, unreachable
from worker.kafka.consumer import Consumer
from worker.kafka.diagnosis import why_unreachable
from worker.kafka.group_consumer import LONGEST_POLL_INTERVAL_MS
from worker.kafka.partition_reader import UNREADABLE
from worker.kafka.producer_records import ProducerRecord
from worker.kafka.sink import Sink
from worker.kafka.topic_identity import TOPIC_IDS_DOUBT_S
from worker.kafka.topics import wait_until_usable
from worker.printable import printable
from worker.runtime.tasks import cancelled, within
from worker.settings import ReplaySettings, moment_ms
from worker.telemetry.health import Health
from worker.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

CHUNK: Final = 500  # dead letters published and committed at once
READ_TIMEOUT_MS: Final = 1_000
SILENCE_S: Final = 3 * SILENT_BROKERS_S  # so long may it take to find brokers that have come back elsewhere
REQUESTS: Final = 2  # that may time out one after the other before brokers count as away
NO_REASON: Final = "(no dead letter)"  # as this version knows them


class ReplayFailed(UserError):
    """The replay cannot go on; what it has done is committed."""

    exit_code = 1


@dataclass(slots=True)
class Tally:
    """How many dead letters of each reason were (or, by a dry run, would be) sent, could not be, or had been before.

    What is not recognised as a dead letter is kept back: each replay meets it again. ``first_kept_back`` says where the
    first is.
    """

    sent: Counter[str] = field(default_factory=Counter)
    not_kept: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    kept_back: Counter[str] = field(default_factory=Counter)
    first_kept_back: str = ""
    done_before: int = 0
    left: int = 0

    def table(self, sent: str) -> Table:
        table = Table("reason", sent, "value not kept", "refused", "kept back")
        for column in table.columns[1:]:
            column.justify = "right"
        columns = (self.sent, self.not_kept, self.refused, self.kept_back)
        for reason in sorted(set().union(*columns)):
            table.add_row(escape(printable(reason)), *(str(column[reason]) for column in columns))
        table.add_section()
        table.add_row("all", *(str(column.total()) for column in columns))
        return table


@dataclass(slots=True)
class Lane:
    """One partition of dead letters: what of it has been replayed, and from where to where this replay goes."""

    done: ReplayProgress
    next: int
    end: int


def run(settings: ReplaySettings) -> int:
    """Replays, prints what has become of how many, and answers with the exit code. Blocks. Raises UserError."""
    with _progress() as progress:
        tally = asyncio.run(_replayed(settings, progress))
    console = Console()
    console.print(tally.table("would be replayed" if settings.dry_run else "replayed"))
    for sentence in _remarks(tally):
        console.print(printable(sentence), markup=False, soft_wrap=True)
    return 1 if tally.left or tally.refused or tally.kept_back else 0


async def _replayed(settings: ReplaySettings, progress: Progress) -> Tally:
    return await Replay(settings, progress).run()  # its clients want a running loop


def _progress() -> Progress:
    return Progress(
        TextColumn("dead letters"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )


def _remarks(tally: Tally) -> list[str]:
    remarks = []
    if tally.done_before:
        remarks.append(f"{tally.done_before} more have been replayed before.")
    if tally.not_kept:
        remarks.append("Where the value was not kept, for its size, only its producer can send it again.")
    if tally.refused:
        remarks.append(
            "What is refused is too large for the topic that it came from, or this machine's clock is wrong; it stays a "
            "dead letter."
        )
    if tally.kept_back:
        remarks.append(
            f"What is kept back is not recognised as a dead letter (the first: {tally.first_kept_back}); the next replay "
            "meets it again."
        )
    if tally.left:
        remarks.append(f"Stopped with up to {tally.left} left; the next replay goes on there.")
    return remarks


class Replay:
    """One replay, or a dry run of it, which joins no group, commits nothing and sends nothing."""

    def __init__(self, settings: ReplaySettings, progress: Progress) -> None:
        self._connection = kafka_connection(settings)
        self._patience_s = REQUESTS * self._connection.request_timeout_s
        self._topic = settings.dead_letter_topic
        self._group_id = settings.replay_group_id or f"{settings.group_id}.replay"
        self._reasons = frozenset(settings.reason)
        self._since = moment_ms(settings.since) if settings.since else None
        self._until = moment_ms(settings.until) if settings.until else None
        self._is_dry = settings.dry_run
        self._decoder = Decoder(input_format=settings.input_format, id_field=settings.id_field)
        self._health = Health()
        self._progress = progress
        self._bar = progress.add_task("", total=None)
        self._sink = Sink(self._connection, limits={}, metrics=Metrics(""), health=self._health)
        self._consumer = Consumer(
            **self._connection.options(),
            group_id=self._group_id,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            max_poll_interval_ms=LONGEST_POLL_INTERVAL_MS,
        )
        use_topics(self._consumer, [self._topic])
        self._topic_id = ""  # of the dead letters; what a topic had done that was made anew is not taken for theirs
        self._lanes: dict[TopicPartition, Lane] = {}
        self._topics: set[str] = set()  # known to exist
        self._tally = Tally()
        self._owned: set[TopicPartition] = set()
        self._assigned = asyncio.Event()
        self._working = asyncio.Lock()  # while a chunk is published and not yet committed
        self._stop = asyncio.Event()

    async def run(self) -> Tally:
        """Goes through all partitions. Ends early after the first signal; a second one ends the process."""
        self._heed_signals()
        await self._unless_stopped(
            wait_until_usable(
                self._connection, {"dead_letter_topic": [self._topic]}, self._health, patience_s=self._patience_s
            )
        )
        if self._stop.is_set():
            raise ReplayFailed("stopped before it had begun")
        try:
            await self._begin()
            for tp, lane in self._lanes.items():
                await self._go_through(tp, lane)
        except UNREACHABLE as error:
            where = unreachable(self._connection, error, await why_unreachable(self._connection))
            raise ReplayFailed(f"{where}; the next replay goes on where this one was") from error
        finally:
            await stop_client(self._consumer, "consumer", 10)
            await self._sink.close(5)
        self._tally.left = sum(lane.end - lane.next for lane in self._lanes.values())
        return self._tally

    # Begin.

    def _heed_signals(self) -> None:
        def stop_or_end() -> None:
            if self._stop.is_set():
                os._exit(1)
            self._stop.set()
            log.warning("stopping when what is under way is committed; once more ends at once")

        for signum in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(signum, stop_or_end)

    async def _begin(self) -> None:
        timeout_s = self._connection.request_timeout_s
        await within(timeout_s, self._consumer.start())
        self._topic_id = await within(timeout_s, self._agreed_id())
        partitions = await within(timeout_s, partitions_of(self._consumer, self._topic))
        tps = [TopicPartition(self._topic, number) for number in sorted(partitions)]
        if self._is_dry:
            self._consumer.assign(tps)
        else:
            await self._join(tps)
        self._lanes = await within(timeout_s, self._planned(tps))
        self._progress.update(self._bar, total=sum(lane.end - lane.next for lane in self._lanes.values()))

    async def _join(self, tps: Collection[TopicPartition]) -> None:
        """All partitions have to be this process's: with fewer, another replay has the rest."""
        self._consumer.subscribe([self._topic], listener=_Listener(self))
        await within(self._connection.request_timeout_s, self._assigned.wait())
        if self._owned != set(tps):
            raise ReplayFailed(f"another replay is running in the group {self._group_id}; wait for it to end")

    async def _planned(self, tps: list[TopicPartition]) -> dict[TopicPartition, Lane]:
        begins, ends = await self._consumer.beginning_offsets(tps), await self._consumer.end_offsets(tps)
        since, until = await self._offsets_at(self._since, tps, ends), await self._offsets_at(self._until, tps, ends)
        states = await self._states(tps)
        lanes = {}
        for tp in tps:
            done = states[tp]
            done.forget_before(begins[tp])
            end = ends[tp] if self._until is None else min(ends[tp], until[tp])
            begin = max(done.offset, begins[tp] if self._since is None else since[tp])
            lanes[tp] = Lane(done, min(begin, end), end)
        return lanes

    async def _offsets_at(
        self, moment: int | None, tps: list[TopicPartition], ends: Mapping[TopicPartition, int]
    ) -> dict[TopicPartition, int]:
        """The first offset of a dead letter that was written then or later."""
        if moment is None:
            return {}
        found = await self._consumer.offsets_for_times(dict.fromkeys(tps, max(0, moment)))
        return {tp: found[tp].offset if found.get(tp) else ends[tp] for tp in tps}

    async def _states(self, tps: list[TopicPartition]) -> dict[TopicPartition, ReplayProgress]:
        commits = await self._consumer.committed_offsets(tps)
        if not all(is_of(self._topic_id, commit.metadata) for commit in commits.values()):
            await asyncio.sleep(TOPIC_IDS_DOUBT_S)
            self._topic_id = await self._agreed_id()
        return {tp: self._done(commits[tp]) for tp in tps}

    async def _agreed_id(self) -> str:
        """The topic's id, on which the brokers agree; by another one, all that was done would be done again."""
        topic_id = await self._consumer.agreed_topic_id(self._topic)
        if topic_id is None or topic_id != (self._topic_id or topic_id):
            raise ReplayFailed(f"the brokers do not agree on which topic has the name {self._topic}; try again later")
        return topic_id

    def _done(self, commit: OffsetAndMetadata) -> ReplayProgress:
        _, state = without_topic_id(commit.metadata)
        if not is_of(self._topic_id, commit.metadata):
            log.warning("the topic %s was deleted and made again: all of it is replayed", self._topic)
            return ReplayProgress(0)
        return ReplayProgress.read(max(0, commit.offset), state)

    # Go through.

    async def _go_through(self, tp: TopicPartition, lane: Lane) -> None:
        with contextlib.suppress(IllegalStateError):  # revoked just now: it is begun there when it comes back
            self._consumer.seek(tp, lane.next)
        heard_at = time.monotonic()
        while lane.next < lane.end and not self._stop.is_set():
            if tp not in self._owned and not self._is_dry:
                await self._unless_stopped(within(SILENCE_S, self._assigned.wait()))
            records, reached = await self._read(tp, lane)
            if reached > lane.next:
                heard_at = time.monotonic()
                async with self._working:
                    await self._settle(tp, lane, records, min(reached, lane.end))
            elif time.monotonic() - heard_at > SILENCE_S:
                raise ReplayFailed(f"Kafka has sent nothing of {self._where()} for {SILENCE_S:g} s; try again later")

    async def _read(self, tp: TopicPartition, lane: Lane) -> tuple[list[ConsumerRecord], int]:
        """Some dead letters, and the offset after them; the ends of transactions take up offsets and hold none."""
        try:
            fetched = await self._consumer.getmany(tp, timeout_ms=READ_TIMEOUT_MS, max_records=CHUNK)
            records = [record for record in fetched.get(tp, ()) if lane.next <= record.offset < lane.end]
            if records:
                return records, records[-1].offset + 1
            return [], await within(READ_TIMEOUT_MS / 1000, self._consumer.position(tp))
        except (IllegalStateError, TimeoutError):  # the group is rebalancing
            return [], lane.next
        except UNREADABLE as error:
            raise ReplayFailed(
                f"the dead letter of {tp.topic}-{tp.partition} at offset {lane.next}, or one behind it, cannot be read "
                f"({type(error).__name__})"
            ) from error

    async def _settle(self, tp: TopicPartition, lane: Lane, letters: list[ConsumerRecord], reached: int) -> None:
        """Publishes what there is to publish, and commits that it is done."""
        due, kept_back = self._due(lane, letters)
        lane.done.add(lane.next, reached, self._reasons, kept_back)
        if self._is_dry:
            self._tally.sent.update(record.reason for record in due)
        else:
            commit = {tp: (lane.done.offset, self._metadata(lane.done))}  # before anything is sent: it may not fit
            if due:
                await self._send(due)
            await self._commit(commit)
        self._progress.advance(self._bar, reached - lane.next)
        lane.next = reached

    def _due(self, lane: Lane, letters: list[ConsumerRecord]) -> tuple[list[OriginalRecord], list[int]]:
        """What is to be published, and the offsets of what is not recognised: it may be of any reason."""
        due, kept_back = [], []
        for letter in letters:
            record = read_dead_letter(letter)
            reason = record.reason if record else NO_REASON
            if record and self._reasons and reason not in self._reasons:
                continue
            if lane.done.has(letter.offset, reason):
                self._tally.done_before += 1
            elif record is None:
                kept_back.append(letter.offset)
                self._tally.kept_back[reason] += 1
                where = f"{letter.topic}-{letter.partition} at offset {letter.offset}"
                self._tally.first_kept_back = self._tally.first_kept_back or where
            elif record.is_whole and (record.key is not None or record.value is not None):
                due.append(record)
            else:
                self._tally.not_kept[reason] += 1
        return due, kept_back

    async def _send(self, due: list[OriginalRecord]) -> None:
        missing = {record.topic for record in due} - self._topics
        if missing:
            await self._unless_stopped(
                wait_until_usable(
                    self._connection, {"source.topic": sorted(missing)}, self._health, patience_s=self._patience_s
                )
            )
            if self._stop.is_set():
                raise ReplayFailed(
                    f"stopped before {', '.join(sorted(missing))} could be used; the next replay goes on there"
                )
            self._topics |= missing
        producer_records = [
            ProducerRecord(record.topic, record_to_replay(record, self._decoder.id_of(record)), record.partition)
            for record in due
        ]
        for record, refusal in zip(due, await self._sink.publish(producer_records), strict=True):
            (self._tally.refused if refusal else self._tally.sent)[record.reason] += 1

    def _metadata(self, done: ReplayProgress) -> str:
        try:
            return with_topic_id(self._topic_id, done.metadata())
        except ProgressTooLarge:
            raise ReplayFailed(
                f"the group {self._group_id} cannot remember so many gaps in what it has replayed; replay all, or, where "
                "they are records that are no dead letters, what is newer (since) with another replay_group_id"
            ) from None

    async def _commit(self, commit: dict[TopicPartition, tuple[int, str]]) -> None:
        backoff = Backoff()
        while True:
            try:
                await within(self._connection.request_timeout_s, self._consumer.commit(commit))
            except (CommitFailedError, IllegalStateError):
                raise ReplayFailed(
                    f"the group {self._group_id} gave {self._where()} away; up to {CHUNK} may be replayed once more"
                ) from None
            except (KafkaError, OSError, TimeoutError) as error:
                self._health.failing("commit", f"cannot commit what is replayed ({type(error).__name__})")
                await backoff.wait()
            else:
                self._health.working("commit")
                return

    # The group.

    async def on_revoked(self) -> None:
        """Waits until what is under way has been committed, so that nobody else sends it again."""
        async with self._working:
            self._owned = set()
            self._assigned.clear()

    async def on_assigned(self, assigned: set[TopicPartition]) -> None:
        for tp in assigned & self._lanes.keys():
            self._consumer.seek(tp, self._lanes[tp].next)
        self._owned = set(assigned)
        self._assigned.set()

    async def _unless_stopped(self, work: Coroutine[Any, Any, object]) -> None:
        """Waits for something, or for a signal."""
        waiting = [asyncio.create_task(work), asyncio.create_task(self._stop.wait())]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if waiting[0].done():
                waiting[0].result()
        finally:
            await cancelled(waiting)

    def _where(self) -> str:
        return f"the topic {self._topic}"


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]
    def __init__(self, replay: Replay) -> None:
        self._replay = replay

    async def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        await self._replay.on_revoked()

    async def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        await self._replay.on_assigned(assigned)
