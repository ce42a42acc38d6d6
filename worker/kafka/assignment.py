"""A partition while the group assigns it to this process: what source, delivery and pipeline tell each other about."""

import time
from collections import deque
from dataclasses import dataclass, field

from aiokafka import TopicPartition

from worker.kafka.reader import Record


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

    def reach(self, next_offset: int) -> None:
        """Notes that everything before ``next_offset`` is acknowledged."""
        self.acknowledged = next_offset
        while self.waiting and self.waiting[0][0] <= next_offset:
            self.waiting.popleft()

    def is_idle(self) -> bool:
        """Whether everything that was read is acknowledged."""
        return self.delivered is not None and self.acknowledged == self.delivered


Chunk = tuple[Assignment, list[Record]]
