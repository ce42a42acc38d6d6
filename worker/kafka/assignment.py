"""The partitions that the group assigns to this process: what source, delivery and pipeline tell each other about."""

import asyncio
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from aiokafka import TopicPartition

from worker.kafka.reader import Record
from worker.telemetry.metrics import Metrics


@dataclass(eq=False, slots=True)
class Assignment:
    """One partition, for as long as the group assigns it to this process.

    ``accepts``: its records may enter the network; ``is_owned``: they may be published and committed. A revocation ends
    the first at once, and the second when everything under way is committed or the deadline has passed.
    """

    tp: TopicPartition
    accepts: bool = True
    is_owned: bool = True
    delivered: int | None = None  # the next offset to read; None until it is known where to begin
    acknowledged: int | None = None  # the next offset to commit
    committed: int | None = None
    metadata: str = ""  # of each commit: which topic of this name it is
    under_way: int = 0  # records taken by the pipeline, and neither acknowledged nor dropped
    uncommitted: int = 0  # records acknowledged since the last commit
    is_out_of_range: bool = False  # the offset to read next is gone
    careful_reads: int = 0  # so many reads of one record each, to find the one that cannot be read
    heard_at: float = field(default_factory=time.monotonic)
    measured_at: float = field(default_factory=time.monotonic)  # when its end was known the last time
    unpacks_since: float | None = None  # that it has been seen to wait for room to unpack a batch, or for that itself
    # of each read that is not acknowledged: the offset after it, and its first record's timestamp
    waiting: deque[tuple[int, int | None]] = field(default_factory=deque)

    @property
    def name(self) -> str:
        """As ``topic-partition``."""
        return partition_name(self.tp)

    def reach(self, next_offset: int) -> None:
        """Notes that everything before ``next_offset`` is acknowledged."""
        self.acknowledged = next_offset
        while self.waiting and self.waiting[0][0] <= next_offset:
            self.waiting.popleft()

    def is_idle(self) -> bool:
        """Whether everything that was read is acknowledged."""
        return self.delivered is not None and self.acknowledged == self.delivered


Chunk = tuple[Assignment, list[Record]]


class Assignments(dict[TopicPartition, Assignment]):
    """The partitions that this process has now, and what becomes of the records that were read of them."""

    def __init__(self, metrics: Metrics) -> None:
        super().__init__()
        self._metrics = metrics
        self.acknowledged = asyncio.Event()  # there is something to commit
        self.settled = asyncio.Event()  # records were acknowledged or dropped
        self.is_draining = False  # nothing more is read, for good
        self.read_again = 0  # records that were under way when the drain began, and were not committed

    def acknowledge(self, assignment: Assignment, next_offset: int, records: int) -> None:
        assignment.under_way -= records
        if assignment.is_owned:
            assignment.reach(next_offset)
            assignment.uncommitted += records
            self.acknowledged.set()
        else:
            self.repeat(records)
        self.settled.set()

    def advance(self, assignment: Assignment, next_offset: int, records: int) -> None:
        assignment.under_way -= records
        if records:  # an offset alone is acknowledged already, and perhaps a later one too
            assignment.reach(next_offset)
        assignment.committed = next_offset
        self.settled.set()

    def drop(self, assignment: Assignment, records: int) -> None:
        assignment.under_way -= records
        if self.is_draining:
            self.read_again += records
        self.settled.set()

    def repeat(self, records: int) -> None:
        """These records are published and not committed: the partition's next owner repeats them."""
        self._metrics.duplicates_possible.inc(records)
        if self.is_draining:
            self.read_again += records


def partition_name(tp: TopicPartition) -> str:
    return f"{tp.topic}-{tp.partition}"


def partition_names(partitions: Iterable[TopicPartition]) -> str:
    return ",".join(partition_name(tp) for tp in sorted(partitions))
