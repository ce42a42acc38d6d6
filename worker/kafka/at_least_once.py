"""Delivery at least once: one producer publishes outcomes, and the consumer commits what is acknowledged."""

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from aiokafka.errors import CommitFailedError, IllegalStateError

from worker.kafka.assignment import Assignment
from worker.kafka.connection import UNREACHABLE, error_name
from worker.kafka.delivery import Count, Outcome, Owner, Publish
from worker.kafka.permissions import missing_permission
from worker.kafka.sink import RECORDS_PER_PUBLISH, Sink
from worker.runtime.loop_budget import TurnBudget
from worker.runtime.tasks import within
from worker.telemetry.health import Health
from worker.telemetry.metrics import Metrics

Put = tuple[Assignment, Sequence[Outcome]]


class AtLeastOnce:
    """Implements ``Delivery``: publishes by one producer, and has the consumer commit what the brokers have acknowledged.

    ``capacity`` is how many records may wait in ``put`` for those before them to be acknowledged.
    """

    requires_stable_offsets = False

    def __init__(self, sink: Sink, *, capacity: int, turn_budget: TurnBudget, metrics: Metrics, health: Health) -> None:
        self._sink = sink
        self._capacity = capacity
        self._turn_budget = turn_budget
        self._metrics = metrics
        self._health = health
        self._waiting: deque[Put] = deque()
        self._records = 0  # that wait
        self._arrived = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._is_finishing = False

    def serve(self, owner: Owner, publish: Publish, count: Count) -> None:
        self._owner = owner
        self._publish = publish
        self._count = count

    async def start(self) -> None:
        await self._sink.start()

    async def begin(self, assignment: Assignment) -> None: ...

    def flush(self, assignments: Iterable[Assignment]) -> None: ...

    def abandon(self, assignment: Assignment) -> None: ...

    def release(self, assignment: Assignment) -> None: ...

    async def commit(self, due: Sequence[tuple[Assignment, int, int]], timeout_s: float) -> bool:
        started = time.monotonic()
        offsets = {assignment.tp: (offset, assignment.metadata) for assignment, offset, _ in due}
        try:
            await within(max(0.1, timeout_s), self._owner.commit_offsets(offsets))
        except (CommitFailedError, IllegalStateError):
            self._metrics.kafka_errors.labels("commit").inc()
            return True  # the group is rebalancing: the revocation decides
        except UNREACHABLE as error:
            self._metrics.kafka_errors.labels("commit").inc()
            why = missing_permission(error, "READ") or error_name(error)
            self._health.failing("commit", f"cannot commit offsets: {why}")
            return False
        self._health.working("commit")
        self._metrics.stage_seconds["commit"].observe(time.monotonic() - started)
        for assignment, offset, records in due:
            assignment.committed = offset
            assignment.uncommitted -= records
        return True

    async def put(self, assignment: Assignment, outcomes: Sequence[Outcome]) -> None:
        while self._records >= self._capacity:
            self._room.clear()
            await self._room.wait()
        self._waiting.append((assignment, outcomes))
        self._records += len(outcomes)
        self._arrived.set()

    def finish(self) -> None:
        self._is_finishing = True
        self._arrived.set()

    async def run(self) -> None:
        while self._waiting or not self._is_finishing:
            if not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
                continue
            waiting, self._waiting, self._records = self._waiting, deque(), 0
            self._room.set()
            started = time.monotonic()
            for some in _rounds(waiting):
                await self._deliver(some)
            self._metrics.stage_seconds["publish"].observe(time.monotonic() - started)

    async def close(self, timeout_s: float) -> None:
        await self._sink.close(timeout_s)

    async def _deliver(self, puts: Sequence[Put]) -> None:
        await self._turn_budget.before(sum(len(outcomes) for _, outcomes in puts))
        owned = [(assignment, outcomes) for assignment, outcomes in puts if assignment.is_owned]
        for assignment, outcomes in puts:
            if not assignment.is_owned:
                self._owner.drop(assignment, len(outcomes))
        published = [outcome for _, outcomes in owned for outcome in outcomes]
        if not published:
            return
        await self._publish(published, self._sink)
        now = time.time()
        await self._turn_budget.before(len(published))
        self._count(published, now)
        for assignment, outcomes in owned:
            self._owner.acknowledge(assignment, outcomes[-1].record.offset + 1, len(outcomes))


def _rounds(puts: Iterable[Put]) -> Iterator[list[Put]]:
    """The puts in their order, in lists of at least RECORDS_PER_PUBLISH records each; only the last may have fewer."""
    some: list[Put] = []
    records = 0
    for put in puts:
        some.append(put)
        records += len(put[1])
        if records >= RECORDS_PER_PUBLISH:
            yield some
            some, records = [], 0
    if some:
        yield some
