"""Detects that nothing is read although the consumer was replaced several times."""

import asyncio
from collections import Counter
from typing import Final

from aiokafka import TopicPartition

from worker.kafka.assignment import Assignments, partition_names
from worker.kafka.group_consumer import ENDS_TIMEOUT_S, GroupConsumer, Rejoin

MAX_REJOINS: Final = 3  # in a row without progress in a partition that has records: the process ends


class Standstill(Exception):
    """There are records, none is read, and joining the group again did not help; the message says why. Exit code 1."""


class StandstillDetector:
    """Compares the positions of the partitions at the end of one session of the source with those of the next."""

    def __init__(self, consumer: GroupConsumer, assignments: Assignments) -> None:
        self._consumer = consumer
        self._assignments = assignments
        self._positions: dict[TopicPartition, int] = {}  # when the group was last joined again
        self._sessions_unmoved: Counter[TopicPartition] = Counter()  # in a row in which it did not move, with records
        self._sessions_not_started = 0  # in a row in which no partition was started

    def partition_started(self) -> None:
        """A partition is read from a known offset, or the group has assigned no partition to this process."""
        self._sessions_not_started = 0

    async def check(self, reason: Rejoin) -> None:
        """Is called when a session ends for ``reason``, with its consumer still live.

        Raises Standstill where the group was joined again MAX_REJOINS times in a row, and either a partition that has
        records has not moved, or no partition was started at all. A partition whose position or end is not known does
        not count.
        """
        self._sessions_not_started += 1
        if self._sessions_not_started > MAX_REJOINS:
            raise Standstill(f"nothing is read, although the group was joined again {MAX_REJOINS} times: {reason}")
        assignments = [each for each in self._assignments.values() if not each.is_finished()]
        found = await asyncio.gather(*(self._consumer.position(each.tp) for each in assignments))
        positions = {each.tp: at for each, at in zip(assignments, found, strict=True) if at is not None}
        for tp, is_behind in (await self._behind(positions)).items():
            is_unmoved = is_behind and self._positions.get(tp) == positions[tp]
            self._sessions_unmoved[tp] = self._sessions_unmoved[tp] + 1 if is_unmoved else 0
        self._positions |= positions
        stuck = [tp for tp in positions if self._sessions_unmoved[tp] == MAX_REJOINS]
        if stuck:
            raise Standstill(
                f"nothing of {partition_names(stuck)} is read any more, although there are records and the group was "
                f"joined again {MAX_REJOINS} times: {reason}"
            )

    async def _behind(self, positions: dict[TopicPartition, int]) -> dict[TopicPartition, bool]:
        """Whether partitions have records beyond these positions; without those whose end is not known."""
        ends = await self._consumer.live.ends(list(positions), ENDS_TIMEOUT_S)
        return {tp: end > positions[tp] for tp, end in ends.items() if not isinstance(end, Exception)}
