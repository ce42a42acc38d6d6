"""The delivery port: it publishes outcomes and commits offsets. There is one implementation for each guarantee."""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from aiokafka import TopicPartition
from aiokafka.structs import OffsetAndMetadata

from worker.core.events import Failure, Record
from worker.core.sentiment import Sentiment
from worker.kafka.assignment import Assignment
from worker.kafka.producer_records import ProducerRecord
from worker.kafka.sink import Sink
from worker.reasons import SkipReason


@dataclass(slots=True)
class Outcome:
    """What becomes of one record: something to publish, or nothing; why, if it failed; and what to count."""

    record: Record
    producer_record: ProducerRecord | None
    failure: Failure | None = None
    sentiment: Sentiment | None = None


@dataclass(slots=True)
class Skipped(Outcome):
    """A record of which nothing is published."""

    reason: SkipReason = "null"


Publish = Callable[[Sequence[Outcome], Sink], Awaitable[None]]
Count = Callable[[Sequence[Outcome], float], None]


class Owner(Protocol):
    """Whoever owns the assignments: the source. None of these calls blocks, but for the two that are awaited."""

    def acknowledge(self, assignment: Assignment, next_offset: int, records: int) -> None:
        """Everything before ``next_offset`` is published, the last ``records`` just now; it is to be committed."""

    def advance(self, assignment: Assignment, next_offset: int, records: int) -> None:
        """Everything before ``next_offset`` is published and committed."""

    def drop(self, assignment: Assignment, records: int) -> None:
        """These records go no further under this assignment, and are read again."""

    def restart(self, assignment: Assignment) -> None:
        """The partition begins again from its committed offset."""

    async def committed_offset(self, tp: TopicPartition) -> OffsetAndMetadata:
        """As of ``CommittedOffsets.of``; may wait for long."""

    async def commit_offsets(self, offsets: Mapping[TopicPartition, tuple[int, str]]) -> None:
        """Commits offsets with their metadata as a member of the group; raises the KafkaError of what fails."""


class Delivery(Protocol):
    """Publishes outcomes and commits offsets. Neither source nor pipeline knows which guarantee runs.

    The event loop alone calls it. Whoever puts the worker together calls ``start``; the source calls ``begin``, ``commit``,
    ``flush``, ``abandon`` and ``release``; the pipeline ``serve``, ``put``, ``run``, ``finish`` and ``close``.
    """

    requires_stable_offsets: bool
    """Whether a partition begins only once no open transaction can change its committed offset."""

    def serve(self, owner: Owner, publish: Publish, count: Count) -> None:
        """Says whom this delivery serves. Is called once, before anything else but ``start``.

        ``publish`` publishes outcomes by a sink, and returns when each of them, or a dead letter in its place, is
        acknowledged. ``count`` takes outcomes that are delivered, and when they were, in s since 1970.
        """

    async def start(self) -> None:
        """Connects, and waits for as long as the brokers are away."""

    async def begin(self, assignment: Assignment) -> None:
        """The partition is this process's. After this has returned, its committed offset may be read.

        Waits for as long as it takes. Raises IllegalStateError if the partition is about to be revoked.
        """

    async def commit(self, due: Sequence[tuple[Assignment, int, int]], timeout_s: float) -> bool:
        """Commits acknowledged offsets, and notes them in their assignments. False: try again.

        ``due`` has assignment, offset and the number of records acknowledged since the last commit. Waits at most
        ``timeout_s``.
        """

    def flush(self, assignments: Iterable[Assignment]) -> None:
        """These partitions are about to be revoked: what was put of them is delivered without delay."""

    def abandon(self, assignment: Assignment) -> None:
        """This assignment's work is dropped; the partition may begin again under another one."""

    def release(self, assignment: Assignment) -> None:
        """The partition is no longer this process's: what is not committed stays uncommitted."""

    async def put(self, assignment: Assignment, outcomes: Sequence[Outcome]) -> None:
        """Takes outcomes of one partition, in the order of their offsets. Waits while too much is waiting already."""

    async def run(self) -> None:
        """Delivers what was put. Ends after ``finish``, once all is delivered. Raises what trying again cannot cure."""

    def finish(self) -> None:
        """Nothing more will be put."""

    async def close(self, timeout_s: float) -> None:
        """Disconnects, within ``timeout_s``."""
