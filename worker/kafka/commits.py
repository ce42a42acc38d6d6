"""When acknowledged offsets are committed. The delivery knows how."""

import asyncio
import contextlib
import time

from worker.kafka.assignment import Assignments
from worker.kafka.delivery import Delivery
from worker.kafka.group_consumer import GroupConsumer
from worker.runtime.backoff import Backoff
from worker.runtime.tasks import within


class Commits:
    """Commits the newest acknowledged offset of each partition; one commit at a time."""

    def __init__(
        self, consumer: GroupConsumer, delivery: Delivery, assignments: Assignments, request_timeout_s: float
    ) -> None:
        self._consumer = consumer
        self._delivery = delivery
        self._assignments = assignments
        self._request_timeout_s = request_timeout_s
        self._lock = asyncio.Lock()

    async def run(self) -> None:
        """Commits what is acknowledged, as soon as the commit before it has ended, until it is cancelled."""
        backoff = Backoff()
        while True:
            await self._assignments.commit_due.wait()
            self._assignments.commit_due.clear()
            if await self._commit(self._request_timeout_s):
                backoff = Backoff()
            else:
                await backoff.wait()
                self._assignments.commit_due.set()

    async def commit_before(self, deadline: float) -> None:
        """The last commit; it may first have to wait for one under way. Raises nothing at the deadline.

        ``deadline`` is of ``time.monotonic``.
        """
        with contextlib.suppress(TimeoutError):
            timeout_s = max(0.1, deadline - time.monotonic())
            await within(timeout_s, self._commit(timeout_s))

    async def _commit(self, timeout_s: float) -> bool:
        """Commits what is due. False if it has to be tried again."""
        async with self._lock:
            due = [
                (assignment, assignment.acknowledged, assignment.uncommitted)
                for assignment in self._assignments.values()
                if assignment.acknowledged is not None and assignment.acknowledged != assignment.committed
            ]
            if not due or not self._consumer.is_live:
                return True
            is_done = await self._delivery.commit(due, timeout_s)
            self._assignments.settled.set()
            return is_done
