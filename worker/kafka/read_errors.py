"""What to do about a call to Kafka that failed while partitions were read, or while there were none to read."""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Final

from aiokafka import TopicPartition
from aiokafka.errors import (
    InconsistentGroupProtocolError,
    InvalidSessionTimeoutError,
    KafkaError,
    KafkaTimeoutError,
)

from worker.errors import WrongSetting
from worker.kafka.aiokafka_compat.group import NOT_THE_COORDINATOR, InstanceIdTaken
from worker.kafka.connection import Connection, unreachable
from worker.kafka.group_consumer import Rejoin
from worker.kafka.permissions import missing_permission
from worker.telemetry.health import Health

MEMBERSHIP: Final = "membership"  # stands for the membership in the group, where other failures name a partition


@dataclass(slots=True)
class KnownOutages:
    """What LagWatcher and GroupHealth know to be unavailable. They tell health about it themselves."""

    brokers_away_at: float = -math.inf  # when no broker answered the last time
    is_coordinator_away: bool = False
    partitions: Mapping[TopicPartition, Exception] = field(default_factory=dict)  # whose end is not known, and why

    def explain(self, who: Hashable) -> bool:
        """Whether these outages are why a call for ``who``, a partition or MEMBERSHIP, fails."""
        return self.is_coordinator_away or who in self.partitions


class ReadErrors:
    """Decides whether a failed call is tried again, replaces the consumer, or ends the process; tells health of it."""

    def __init__(
        self,
        connection: Connection,
        outages: KnownOutages,
        *,
        group_id: str,
        group_instance_id: str | None,
        session_timeout_ms: int,
        health: Health,
    ) -> None:
        self._connection = connection
        self._outages = outages
        self._group_id = group_id
        self._group_instance_id = group_instance_id
        self._session_timeout_ms = session_timeout_ms
        self._health = health

    def clear(self, who: Hashable) -> None:
        """Calls succeed again for ``who``, or it has gone."""
        for part in ("kafka", "read"):
            self._health.working(part, who)

    def handle(self, error: BaseException, who: Hashable) -> None:
        """Decides on a failed call: returns if the caller should try again, else raises Rejoin or WrongSetting.

        Health shows the trouble for ``who``, a partition or MEMBERSHIP, until ``clear``, except what a watcher shows.
        """
        if lacking := missing_permission(error, "READ"):
            self._health.failing("read", f"cannot read: {lacking}", who)
        elif isinstance(error, InvalidSessionTimeoutError):
            raise WrongSetting(
                f"session_timeout_ms = {self._session_timeout_ms} is outside of what the broker allows "
                "(group.min.session.timeout.ms to group.max.session.timeout.ms)"
            ) from None
        elif isinstance(error, InstanceIdTaken):
            raise WrongSetting(
                f"group_instance_id {self._group_instance_id!r} is used by another process of this group, which has joined "
                "later and goes on; each needs one of its own"
            ) from None
        elif isinstance(error, InconsistentGroupProtocolError):
            raise Rejoin(
                f"group {self._group_id} has members that share out partitions in another way: another application uses "
                "this group_id, and one of the two needs one of its own"
            ) from error
        elif isinstance(error, KafkaError) and not isinstance(error, KafkaTimeoutError) and not error.retriable:
            raise Rejoin(_one_line(error)) from error  # the coordination has ended
        elif not (isinstance(error, NOT_THE_COORDINATOR) or self._outages.explain(who)):
            self._health.failing("kafka", unreachable(self._connection, error), who)


def _one_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
