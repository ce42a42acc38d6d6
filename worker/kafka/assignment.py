"""The partitions that the group assigns to this process, and how far their records have come.

Source, delivery and pipeline refer to a partition by its ``Assignment``. The event loop alone uses them.
"""

import asyncio
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from aiokafka import TopicPartition

from worker.core.bounds import Bound
from worker.kafka.aiokafka_compat.transactions import Membership
from worker.kafka.reader import FetchedRecord
from worker.telemetry.metrics import Metrics


@dataclass(eq=False, slots=True)
class Assignment:
    """One partition, for as long as the group assigns it to this process.

    ``accepts`` says whether its records may enter the model, ``is_owned`` whether they may be published and committed. A
    revocation ends the first at once, and the second once everything under way is committed or the deadline has passed.
    """

    tp: TopicPartition
    membership: Membership | None = None  # under which the group has assigned it; None if that was lost at once
    accepts: bool = True
    is_owned: bool = True
    delivered: int | None = None  # the next offset to read; None until the start is known
    acknowledged: int | None = None  # the next offset to commit
    committed: int | None = None  # the offset that was committed last
    metadata: str = ""  # of each commit: it names the topic's id, and the bound
    bound: Bound | None = None  # where reading ends; None if it does not
    under_way: int = 0  # records taken by the pipeline, and neither acknowledged nor dropped
    uncommitted: int = 0  # records acknowledged since the last commit
    is_lost: bool = (
        False  # it ended before the drain, or the group refuses its commits: others read what is dropped of it
    )
    has_dropped: bool = False  # records of it were dropped: to commit what comes after them would lose them
    is_out_of_range: bool = False  # the offset to read next is gone
    single_record_reads: int = 0  # how many more reads take one record, to find the unreadable one
    silent_since: float = field(default_factory=time.monotonic)  # since when it has records and sends none
    end_known_at: float = field(default_factory=time.monotonic)  # when its end offset was last known
    log_end: int | None = (
        None  # the offset that was known then to be behind all records, also those in open transactions
    )
    unpacking_since: float | None = None  # since when its reader waits for a batch to be unpacked
    # for each read that is not acknowledged: the offset after it, and its first record's timestamp
    unacknowledged_reads: deque[tuple[int, int | None]] = field(default_factory=deque)

    @property
    def name(self) -> str:
        """``topic-partition``, as in logs and messages."""
        return partition_name(self.tp)

    def acknowledge_to(self, next_offset: int) -> None:
        """Notes that everything before ``next_offset`` is acknowledged."""
        self.acknowledged = next_offset
        while self.unacknowledged_reads and self.unacknowledged_reads[0][0] <= next_offset:
            self.unacknowledged_reads.popleft()

    def is_idle(self) -> bool:
        """Whether everything that was read is acknowledged."""
        return self.delivered is not None and self.acknowledged == self.delivered

    def within_bound(self, offset: int) -> int:
        """This offset, or that of the bound if it is before: what comes after the bound is not this run's."""
        return offset if self.bound is None else min(offset, self.bound.offset)

    def is_finished(self) -> bool:
        """Whether everything up to the bound is committed."""
        return self.bound is not None and self.bound.is_reached(self.committed)

    def new_from(self, seconds: float) -> int | None:
        """The offset from which on records were written less than so many seconds ago; None where that is not known."""
        return self.log_end if time.monotonic() - self.end_known_at < seconds else None


Chunk = tuple[Assignment, list[FetchedRecord]]


class Assignments(dict[TopicPartition, Assignment]):
    """The current assignments by partition, and the accounting of the records that the pipeline takes from them.

    An assignment that was revoked is no longer in it, but its last records are still counted here.
    """

    def __init__(self, metrics: Metrics) -> None:
        super().__init__()
        self._metrics = metrics
        self.commit_due = asyncio.Event()  # set when an offset to commit has changed
        self.settled = asyncio.Event()  # set when records were acknowledged, committed or dropped
        self.is_draining = False  # the process is ending: nothing more is read
        self._not_committed_in_drain = 0  # records that were dropped, or published without a commit, while draining

    def under_way(self) -> int:
        """How many records of the current assignments the pipeline has taken, and neither acknowledged nor dropped."""
        return sum(assignment.under_way for assignment in self.values())

    def uncommitted(self) -> int:
        """How many records were taken and not committed, at the end of a drain; the next owner reads them again."""
        return self._not_committed_in_drain + sum(each.uncommitted + each.under_way for each in self.values())

    def acknowledge(self, assignment: Assignment, next_offset: int, records: int) -> None:
        """As of ``Owner.acknowledge``."""
        assignment.under_way -= records
        if assignment.is_owned:
            assignment.acknowledge_to(next_offset)
            assignment.uncommitted += records
            self.commit_due.set()
        else:
            self.count_duplicates(records)
        self.settled.set()

    def advance(self, assignment: Assignment, next_offset: int, records: int) -> None:
        """As of ``Owner.advance``."""
        assignment.under_way -= records
        if records:  # an offset alone is acknowledged already, and perhaps a later one too
            assignment.acknowledge_to(next_offset)
        assignment.committed = next_offset
        self.settled.set()

    def drop(self, assignment: Assignment, records: int) -> None:
        """As of ``Owner.drop``."""
        assignment.has_dropped = True
        assignment.under_way -= records
        if self.is_draining and not assignment.is_lost:
            self._not_committed_in_drain += records
        self.settled.set()

    def count_duplicates(self, records: int) -> None:
        """Counts records that are published and not committed: the partition's next owner publishes them again."""
        self._metrics.duplicates_possible.inc(records)
        if self.is_draining:
            self._not_committed_in_drain += records


def partition_name(tp: TopicPartition) -> str:
    return f"{tp.topic}-{tp.partition}"


def partition_names(partitions: Iterable[TopicPartition]) -> str:
    return ",".join(partition_name(tp) for tp in sorted(partitions))
