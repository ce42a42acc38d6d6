"""Fetching from the nearest replica (KIP-392), whatever happens to that replica.

aiokafka sends the client's rack with each fetch. The leader names a replica of that rack, and aiokafka fetches there until
its metadata are old (5 minutes), or a request to it fails. Upstream would have to do what NearestReplicaFetcher does.
"""

import logging
import time
from contextvars import ContextVar
from typing import Any, Final

import aiokafka.consumer.consumer
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.consumer.fetcher import Fetcher
from aiokafka.errors import OffsetOutOfRangeError

log = logging.getLogger(__name__)

LEADERS_S: Final = 10.0  # for so long leaders are asked for records; by default they notice a dead replica after 9 s

_asked: ContextVar[int | None] = ContextVar("_asked", default=None)
"""The broker whose answer to a fetch a task handles."""


class NearestReplicaFetcher(Fetcher):  # type: ignore[misc]
    """aiokafka's task that fetches records, for a consumer with a rack.

    A follower may be behind or lack the first records. The leader is asked for an offset that it does not have, and only the
    leader decides that an offset is gone: aiokafka would believe the follower, and the worker would begin where
    ``auto_offset_reset`` says.

    Where a follower fails, answers with an error, or is a broker that is not known yet, leaders are asked for records
    without a rack, for LEADERS_S. They would else name the same follower again and again, and nothing would be read until
    they notice, or until the metadata are asked for anew.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._leaders_until = 0.0
        self._brokers_told: set[int] = set()

    def leave_replica(self, tp: TopicPartition) -> None:
        """Fetches this partition from its leader, for LEADERS_S."""
        self._preferred_read_replica.pop(tp, None)
        self._ask_leaders()

    def _ask_leaders(self) -> None:
        self._leaders_until = time.monotonic() + LEADERS_S

    def _select_read_replica(self, tp: TopicPartition) -> Any:
        """The broker to fetch from: the leader where the position is not known yet, since it alone tells offsets.

        aiokafka would send it that request beside a fetch under way, and then count the fetch as answered.
        """
        if not self._subscriptions.subscription.assignment.state_value(tp).has_valid_position:
            self._preferred_read_replica.pop(tp, None)
        return super()._select_read_replica(tp)

    def _update_preferred_read_replica(self, tp: TopicPartition, preferred_read_replica: int) -> None:
        if preferred_read_replica < 0:
            return
        if self._client.cluster.broker_metadata(preferred_read_replica) is None:  # it is back, or new
            self._client.force_metadata_update()
            self._ask_leaders()
            return
        super()._update_preferred_read_replica(tp, preferred_read_replica)
        if preferred_read_replica not in self._brokers_told:
            self._brokers_told.add(preferred_read_replica)
            extra = {"broker": preferred_read_replica, "client_rack": self._client_rack}
            log.info("the leaders name a nearer replica to fetch from", extra=extra)

    async def _proc_fetch_request(self, assignment: Any, node_id: int, request: Any) -> bool:
        _asked.set(node_id)
        if time.monotonic() < self._leaders_until:
            request._rack_id = ""
        followed = self._partitions_at(node_id)
        try:
            return bool(await super()._proc_fetch_request(assignment, node_id, request))
        finally:
            lost = followed.keys() - self._partitions_at(node_id).keys()
            if any(time.monotonic() < followed[tp] for tp in lost):  # and it is not that the metadata are old
                self._ask_leaders()

    def _partitions_at(self, node: int) -> dict[TopicPartition, float]:
        """The partitions that are fetched from this broker as a follower, and until when."""
        return {tp: until for tp, (at, until) in self._preferred_read_replica.items() if at == node}

    def _invalidate_preferred_read_replica_for_node(self, node_id: int, request: Any) -> None:
        """A request has failed. aiokafka waits for a moment after this, in which others ask the leaders already."""
        if self._partitions_at(node_id):
            self._ask_leaders()
        super()._invalidate_preferred_read_replica_for_node(node_id, request)

    def _set_error(self, tp: TopicPartition, error: Exception) -> None:
        is_followers = _asked.get() not in (None, self._client.cluster.leader_for_partition(tp))
        if is_followers and isinstance(error, OffsetOutOfRangeError):
            return
        if tp not in self._records:  # a late answer of a follower that was left
            super()._set_error(tp, error)


def _fetcher(*arguments: Any, client_rack: str | None = None, **options: Any) -> Fetcher:
    kind = NearestReplicaFetcher if client_rack else Fetcher
    return kind(*arguments, client_rack=client_rack, **options)


aiokafka.consumer.consumer.Fetcher = _fetcher


def leave_replica(consumer: AIOKafkaConsumer, tp: TopicPartition) -> None:
    """Has a consumer that fetches from the nearest replica ask the leader for a partition, for LEADERS_S.

    The caller knows that the partition has records and sends none; a follower that is behind or hangs does not.
    """
    fetcher = consumer._fetcher
    if isinstance(fetcher, NearestReplicaFetcher):
        fetcher.leave_replica(tp)
