"""What this user may do in Kafka, asked without doing it, and what to say where a permission is missing.

A broker checks permissions before anything else in a request. So each question is a request that has no effect, and that
is refused for another reason where the permission is there: a produce without records, a heartbeat of an unknown member, a
transaction of a producer that does not exist (https://kafka.apache.org/documentation/#operations_resources_and_protocols).
"""

import asyncio
from collections.abc import Iterable
from typing import Any, Final

from aiokafka import TopicPartition
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import GroupAuthorizationFailedError, TopicAuthorizationFailedError
from aiokafka.protocol.coordination import FindCoordinatorRequest
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.protocol.group import HeartbeatRequest
from aiokafka.protocol.produce import ProduceRequest
from aiokafka.protocol.transaction import AddPartitionsToTxnRequest

from worker.kafka.connection import Connection
from worker.runtime.backoff import Backoff
from worker.runtime.tasks import within

NOT_AVAILABLE_YET: Final = 15  # of https://kafka.apache.org/protocol#protocol_error_codes
TOPIC_REFUSED: Final = 29
GROUP_REFUSED: Final = 30
TRANSACTIONAL_ID_REFUSED: Final = 53
NOBODY: Final = "nobody"
PARTITION: Final = 0


def missing_permission(error: BaseException, operation: str) -> str | None:
    """Which permission (ACL) an error of aiokafka's says is missing, and what to do; None for other errors.

    ``operation`` is Kafka's name for what was tried with the topics, such as READ.
    """
    named = error.args[0] if error.args else ""
    names = named if isinstance(named, str) else ", ".join(sorted(map(str, named)))
    if isinstance(error, GroupAuthorizationFailedError):
        return add_the_acl(f"READ on group {names}")
    if isinstance(error, TopicAuthorizationFailedError):
        return add_the_acl(f"{operation} on topic {names}")
    return None


def add_the_acl(*lacking: str) -> str:
    """A sentence about permissions that are missing, such as ``READ on topic texts``."""
    return f"missing {'; '.join(lacking)}; add the ACL"


class Permissions:
    """Asks one cluster. Call ``start`` before the first question and ``close`` after the last.

    Each call takes at most two request timeouts, and raises what is in ``connection.UNREACHABLE``.
    """

    def __init__(self, connection: Connection) -> None:
        self._timeout_s = connection.request_timeout_s
        self._client = AIOKafkaClient(**connection.options())

    async def start(self, topics: Iterable[str]) -> None:
        """Connects, and learns who leads the partitions of ``topics``."""
        self._client.set_topics(set(topics))
        await within(self._timeout_s, self._client.bootstrap())
        await within(self._timeout_s, self._client.force_metadata_update())

    async def close(self) -> None:
        await within(self._timeout_s, self._client.close())

    async def may_read(self, topic: str) -> bool:
        """READ on the topic."""
        beyond_the_end = 2**62
        request = FetchRequest(0, 0, 1, 0, [(topic, [(PARTITION, beyond_the_end, 1)])])
        answer = await self._send(self._leader_or_any(topic), request)
        return _codes(answer.topics) != {TOPIC_REFUSED}

    async def may_write(self, topic: str) -> bool:
        """WRITE on the topic."""
        request = ProduceRequest(None, -1, 1_000, [(topic, [(PARTITION, b"")])])
        answer = await self._send(self._leader_or_any(topic), request)
        return _codes(answer.topics) != {TOPIC_REFUSED}

    async def may_join(self, group: str) -> bool:
        """READ on the group."""
        code, node = await self._coordinator(0, group)
        if code == GROUP_REFUSED:
            return False
        answer = await self._send(node, HeartbeatRequest(group, 0, NOBODY))
        return bool(answer.error_code != GROUP_REFUSED)

    async def may_transact(self, transactional_id: str, topic: str) -> bool:
        """WRITE on the transactional id."""
        code, node = await self._coordinator(1, transactional_id)
        if code == TRANSACTIONAL_ID_REFUSED:
            return False
        answer = await self._send(node, AddPartitionsToTxnRequest(transactional_id, 2**62, 0, [(topic, [PARTITION])]))
        return _codes(answer.errors) != {TRANSACTIONAL_ID_REFUSED}

    async def _coordinator(self, kind: int, name: str) -> tuple[int, int]:
        """An error code and the coordinator's node. The first that ever asks waits while Kafka creates a topic for it."""
        backoff = Backoff()
        async with asyncio.timeout(self._timeout_s):
            while True:
                answer = await self._send(self._client.get_random_node(), FindCoordinatorRequest(name, kind))
                if answer.error_code != NOT_AVAILABLE_YET:
                    return answer.error_code, answer.coordinator_id
                await backoff.wait()

    def _leader_or_any(self, topic: str) -> Any:
        """Each broker checks permissions first; without a leader, one that is not asked for the partition answers too."""
        leader = self._client.cluster.leader_for_partition(TopicPartition(topic, PARTITION))
        return self._client.get_random_node() if leader is None or leader < 0 else leader

    async def _send(self, node: Any, request: Any) -> Any:
        return await within(self._timeout_s, self._client.send(node, request))


def _codes(topics: Iterable[Any]) -> set[int]:
    """The error codes of an answer's partitions: ``(topic, [(partition, code, …), …])`` each."""
    return {partition[1] for _, partitions in topics for partition in partitions}
