"""The buffer between the readers of partitions and the pipeline: it bounds how far partitions are read ahead."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from worker.core.batching import MicroBatcher, TokenLimit
from worker.kafka.assignment import Assignment, Chunk
from worker.kafka.reader import FetchedRecord
from worker.runtime.tasks import within
from worker.telemetry.metrics import Metrics

MAX_READ_RECORDS: Final = 1_000
MIN_READ_RECORDS: Final = 16
READS_PER_CAPACITY: Final = 4  # so many reads fill the buffer: then partitions take turns


class ReadAhead:
    """Gathers records into micro-batches. Readers add records while there is room, and the pipeline takes batches.

    It holds two micro-batches, and at most one read more for each reader.
    """

    def __init__(
        self,
        *,
        max_batch_texts: int,
        linger_s: float,
        metrics: Metrics,
        token_limit: TokenLimit[FetchedRecord] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._batcher: MicroBatcher[Assignment, FetchedRecord] = MicroBatcher(max_batch_texts, linger_s, token_limit)
        self._capacity = 2 * max_batch_texts
        self._metrics = metrics
        self._clock = clock
        self._arrived = asyncio.Event()
        self._has_room = True
        # Readers that wait for their turn: those that had nothing to read until now, who go first, and those with a backlog
        self._waiting: tuple[deque[asyncio.Future[None]], ...] = (deque(), deque())
        self._is_admitting = False
        self._has_ended = False

    def __len__(self) -> int:
        return len(self._batcher)

    async def next_batch(self) -> list[Chunk] | None:
        """The next micro-batch, as runs of records of one assignment each; None once ``end`` was called.

        Waits for records, and then until the batch is full or its oldest record has lingered.
        """
        while not self._has_ended:
            closes_at = self._batcher.closes_at()
            now = self._clock()
            if closes_at is not None and closes_at <= now:
                return self._taken(now)
            await self._wait_for_arrival(None if closes_at is None else closes_at - now)
        return None

    def end(self) -> None:
        """Nothing more is taken: ``next_batch`` answers None."""
        self._has_ended = True
        self._arrived.set()

    def add(self, assignment: Assignment, records: list[FetchedRecord], now: float) -> None:
        """Records of one partition, in the order of their offsets, that arrived at ``now`` by the clock."""
        self._batcher.add(assignment, records, now)
        self._metrics.queue_depth["gather"].set(len(self._batcher))
        if len(self._batcher) >= self._capacity:
            self._has_room = False
        self._arrived.set()

    def discard(self, assignment: Assignment) -> None:
        """Drops what has been read of a partition. Readers that wait for room go on waiting until ``admit`` is called."""
        self._batcher.discard(assignment)
        self._metrics.queue_depth["gather"].set(len(self._batcher))

    def admit(self) -> None:
        """Lets the readers go on, whether or not there is room."""
        self._has_room = True
        self._admit_soon()

    def admit_if_room(self) -> None:
        """Lets the readers go on, if there is room."""
        if len(self._batcher) < self._capacity:
            self.admit()

    def has_room(self) -> bool:
        return self._has_room

    async def until_room(self, *, has_backlog: bool) -> None:
        """Waits for room and a turn. ``has_backlog``: the caller's records waited already; it then comes after all others.

        Whoever calls has something to read: a turn without would starve those with a backlog, where partitions are many.
        Yields even if there is room, for reading what is already fetched never waits.
        """
        turn = asyncio.get_running_loop().create_future()
        self._waiting[has_backlog].append(turn)
        self._admit_soon()
        await turn

    def _admit_soon(self) -> None:
        if not self._is_admitting:
            self._is_admitting = True
            asyncio.get_running_loop().call_soon(self._admit)

    def _admit(self) -> None:
        """Admits one reader, and the next one once that has read what is fetched: a thousand would all wake for three."""
        self._is_admitting = False
        for turns in self._waiting if self._has_room else ():
            while turns:
                turn = turns.popleft()
                if not turn.done():  # else its reader was cancelled
                    turn.set_result(None)
                    self._admit_soon()
                    return

    def read_limit(self) -> int:
        """How many records one read takes: small reads cost more per record, large ones make other partitions wait."""
        room = self._capacity - len(self._batcher)
        return min(MAX_READ_RECORDS, max(MIN_READ_RECORDS, min(room, self._capacity // READS_PER_CAPACITY)))

    def _taken(self, now: float) -> list[Chunk]:
        self._metrics.stage_seconds["wait"].observe(now - (self._batcher.oldest_arrival() or now))
        chunks = self._batcher.take()
        for assignment, records in chunks:
            assignment.under_way += len(records)
        self.admit_if_room()
        self._metrics.queue_depth["gather"].set(len(self._batcher))
        return chunks

    async def _wait_for_arrival(self, timeout_s: float | None) -> None:
        self._arrived.clear()
        try:
            await within(timeout_s, self._arrived.wait())
        except TimeoutError:
            return
