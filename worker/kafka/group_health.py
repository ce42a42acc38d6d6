"""Whether the consumer group works: its coordinator answers, and rebalances end."""

import asyncio
import time
from collections.abc import Callable
from typing import Final

from worker.kafka.aiokafka_compat.group import CoordinatorAnswers
from worker.kafka.assignment import Assignments
from worker.kafka.read_errors import KnownOutages
from worker.kafka.rebalance import RebalanceHandler
from worker.telemetry.health import Health

GROUP_INTERVAL_S: Final = 1.0
MAX_REBALANCE_S: Final = 5.0  # a rebalance that lasts longer makes the worker not ready
COORDINATOR_S: Final = 3.0  # the coordinator is away when it has not answered for so long, and for so many
MISSED_HEARTBEATS: Final = 3  # heartbeats, whichever is longer


class GroupHealth:
    """Tells health that the group's coordinator is away, or that a rebalance takes long."""

    def __init__(
        self,
        rebalances: RebalanceHandler,
        assignments: Assignments,
        outages: KnownOutages,
        *,
        group_id: str,
        heartbeat_ms: int,
        health: Health,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rebalances = rebalances
        self._assignments = assignments
        self._outages = outages
        self._group_id = group_id
        self._patience_s = max(COORDINATOR_S, MISSED_HEARTBEATS * heartbeat_ms / 1000)
        self._health = health
        self._clock = clock

    async def watch(self, answers: CoordinatorAnswers) -> None:
        """Looks every second until it is cancelled. Nobody reads during a rebalance, so one that takes long is reported."""
        while True:
            await asyncio.sleep(GROUP_INTERVAL_S)
            now = self._clock()
            if answers.has_answered and now - answers.at <= self._patience_s:
                self._outages.is_coordinator_away = False
                self._health.working("coordinator")
            elif not answers.is_joining and now - max(answers.at, self._outages.brokers_away_at) > self._patience_s:
                self._outages.is_coordinator_away = True
                self._health.failing(
                    "coordinator",
                    f"the coordinator of group {self._group_id} has not answered for {self._patience_s:g} s",
                )
            since = self._rebalances.rejoining_since
            is_rebalancing = answers.is_joining or self._rebalances.is_revoking()
            # The coordinator, or all of Kafka, is away, which is reported already.
            is_known_why = not is_rebalancing and now - answers.at > MAX_REBALANCE_S
            if (
                since is not None
                and not is_known_why
                and not self._assignments.is_draining
                and now - since > MAX_REBALANCE_S
            ):
                self._health.failing(
                    "group", f"rejoining for more than {MAX_REBALANCE_S:g} s: a member is gone or busy"
                )
