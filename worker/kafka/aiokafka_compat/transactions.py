"""Offsets in a transaction that only a member of the group may commit, in the generation in which it read them (KIP-447).

aiokafka's newest TxnOffsetCommit is version 0, which names no member, so that a broker takes it from anyone. Upstream would
have to speak version 3 (Kafka 2.5), and to take a refusal as a reason to abort.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.client import ConnectionGroup
from aiokafka.errors import (
    IllegalGenerationError,
    KafkaError,
    NoError,
    TopicAuthorizationFailedError,
    UnknownMemberIdError,
    UnknownTopicOrPartitionError,
    for_code,
)
from aiokafka.protocol.admin import ApiVersionRequest
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.transaction import TxnOffsetCommitRequest, TxnOffsetCommitRequest_v0, TxnOffsetCommitResponse_v0
from aiokafka.protocol.types import CompactArray, CompactString, Int16, Int32, Int64, Schema, TaggedFields

from worker.kafka.aiokafka_compat.group import FencedInstanceId
from worker.kafka.aiokafka_compat.metadata import inner_client
from worker.runtime.tasks import within

REFUSALS: Final[Mapping[int, type[KafkaError]]] = {
    error.errno: error for error in (IllegalGenerationError, UnknownMemberIdError, FencedInstanceId)
}
_TAGS: Final = ("tags", TaggedFields)


def by_topic(*partition_fields: tuple[str, Any]) -> CompactArray:
    """The type of an array of topics, each with an array of partitions that have these fields."""
    return CompactArray(("name", CompactString()), ("partitions", CompactArray(*partition_fields, _TAGS)), _TAGS)


@dataclass(frozen=True)
class Membership:
    """A consumer's place in its group, as of one assignment. Raises ValueError where it has none.

    Brokers take generation −1 with no member id from anyone, so it must never be sent.
    """

    group_id: str
    generation: int
    member_id: str
    instance_id: str | None = None

    def __post_init__(self) -> None:
        if self.generation < 0 or not self.member_id:
            raise ValueError(f"no member of the group {self.group_id}")


def membership(consumer: AIOKafkaConsumer) -> Membership | None:
    """The membership under which a consumer has its partitions, if asked when they are assigned; None if it is lost since.

    A heartbeat that is refused resets it at any moment, and a rebalance replaces it. Upstream would have to offer it.
    """
    coordinator = consumer._coordinator
    if coordinator.generation < 0 or not coordinator.member_id:
        return None
    return Membership(
        coordinator.group_id, coordinator.generation, coordinator.member_id, coordinator._group_instance_id
    )


class TxnOffsetCommitResponse_v3(Response):  # type: ignore[misc]  # noqa: N801 - as aiokafka names them
    API_KEY = 28
    API_VERSION = 3
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        ("topics", by_topic(("partition", Int32), ("error_code", Int16))),
        _TAGS,
    )


class TxnOffsetCommitRequest_v3(RequestStruct):  # type: ignore[misc]  # noqa: N801
    FLEXIBLE_VERSION = True  # request header v2, response header v1
    API_KEY = 28
    API_VERSION = 3
    RESPONSE_TYPE = TxnOffsetCommitResponse_v3
    SCHEMA = Schema(
        ("transactional_id", CompactString()),
        ("group_id", CompactString()),
        ("producer_id", Int64),
        ("producer_epoch", Int16),
        ("generation_id", Int32),
        ("member_id", CompactString()),
        ("group_instance_id", CompactString()),
        (
            "topics",
            by_topic(("partition", Int32), ("offset", Int64), ("leader_epoch", Int32), ("metadata", CompactString())),
        ),
        _TAGS,
    )


class MemberTxnOffsetCommitRequest(Request[TxnOffsetCommitRequest_v3]):  # type: ignore[misc]
    """aiokafka's request with the member that commits. Raises NotImplementedError for brokers before Kafka 2.5."""

    API_KEY = 28

    def __init__(self, plain: TxnOffsetCommitRequest_v0, member: Membership) -> None:
        self._plain = plain
        self._member = member

    def build(self, request_struct_class: type[TxnOffsetCommitRequest_v3]) -> TxnOffsetCommitRequest_v3:
        plain, member = self._plain, self._member
        topics: list[Any] = [
            (topic, [(partition, offset, -1, metadata, {}) for partition, offset, metadata in partitions], {})
            for topic, partitions in plain.topics
        ]
        who = (member.generation, member.member_id, member.instance_id)
        return request_struct_class(
            plain.transactional_id, plain.group_id, plain.producer_id, plain.producer_epoch, *who, topics, {}
        )


class TransactionalProducer(AIOKafkaProducer):  # type: ignore[misc]
    """aiokafka's producer, which adds offsets to a transaction as a member of the group.

    Its client sends MemberTxnOffsetCommitRequest in place of aiokafka's request, and answers with the response that aiokafka
    knows. Refusals of the member, or of a topic's offsets, do not reach aiokafka, which would end its sender with an error
    that names neither: ``add_offsets`` raises them.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._member: Membership | None = None
        self._refusal: int | None = None
        self._unauthorized: set[str] = set()  # topics of which this user may commit no offsets
        self.unknown_partitions: set[TopicPartition] = (
            set()
        )  # to the group's coordinator, which takes no offset of them
        self._send_plain = self.client.send
        self.client.send = self._send

    async def add_offsets(self, offsets: Mapping[TopicPartition, tuple[int, str]], member: Membership) -> None:
        """Adds offsets with their metadata to the open transaction. What it raises has to be followed by an abort.

        Raises what is in REFUSALS, and TopicAuthorizationFailedError with the topics that this user may not read.

        Waits without end for brokers to know all these partitions; ``unknown_partitions`` tells of which they last did not.
        """
        self._member, self._refusal, self._unauthorized, self.unknown_partitions = member, None, set(), set()
        await self.send_offsets_to_transaction(offsets, member.group_id)
        if self._refusal is not None:
            raise REFUSALS[self._refusal]
        if self._unauthorized:
            raise TopicAuthorizationFailedError(self._unauthorized)

    async def _send(self, node: Any, request: Any, *, group: Any = ConnectionGroup.DEFAULT) -> Any:
        if not isinstance(request, TxnOffsetCommitRequest):
            return await self._send_plain(node, request, group=group)
        assert self._member is not None  # else send_offsets_to_transaction was called, which fences nobody
        with_member = MemberTxnOffsetCommitRequest(request.build(TxnOffsetCommitRequest_v0), self._member)
        response = await self._send_plain(node, with_member, group=group)
        errors = [
            (topic, [(partition, self._without_refusal(code, topic)) for partition, code, _ in partitions])
            for topic, partitions, _ in response.topics
        ]
        self.unknown_partitions = {
            TopicPartition(topic, partition)
            for topic, partitions in errors
            for partition, code in partitions
            if code == UnknownTopicOrPartitionError.errno
        }
        return TxnOffsetCommitResponse_v0(response.throttle_time_ms, errors)

    def _without_refusal(self, code: int, topic: str) -> int:
        if code in REFUSALS:
            self._refusal = code
        elif code == TopicAuthorizationFailedError.errno:
            self._unauthorized.add(topic)
        else:
            return code
        return 0


# Which brokers know of members in transactions. Upstream would have to offer the versions that it learns from each broker.

NEWEST_NEEDED: Final = {
    TxnOffsetCommitRequest_v3.API_KEY: TxnOffsetCommitRequest_v3.API_VERSION,
    9: 7,
}  # 9: OffsetFetch
VERSIONS_S: Final = 3.0  # for a broker to answer


async def brokers_before_2_5(client: Any) -> list[str]:
    """The addresses of the brokers before Kafka 2.5, which take offsets in a transaction from anyone; of those that answer.

    Takes at most VERSIONS_S. Raises nothing of Kafka's.
    """
    inner = inner_client(client)
    brokers = list(inner.cluster.brokers())
    answers = await asyncio.gather(*(_newest_versions(inner, broker.nodeId) for broker in brokers))
    return [
        f"{broker.host}:{broker.port}"
        for broker, newest in zip(brokers, answers, strict=True)
        if newest is not None and any(newest.get(key, -1) < version for key, version in NEWEST_NEEDED.items())
    ]


async def _newest_versions(client: Any, node: int) -> dict[int, int] | None:
    """By the key of a request its newest version that the broker takes; None where it does not answer."""
    try:
        answer = await within(VERSIONS_S, client.send(node, ApiVersionRequest()))
    except (KafkaError, OSError, TimeoutError):
        return None
    return {key: newest for key, _, newest in answer.api_versions}


# Which transactions are open. Upstream would have to have ListTransactions (Kafka 3.0).


class ListTransactionsResponse_v0(Response):  # type: ignore[misc]  # noqa: N801
    API_KEY = 66
    API_VERSION = 0
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        ("error_code", Int16),
        ("unknown_states", CompactArray(CompactString())),
        (
            "transactions",
            CompactArray(
                ("transactional_id", CompactString()), ("producer_id", Int64), ("state", CompactString()), _TAGS
            ),
        ),
        _TAGS,
    )


class ListTransactionsRequest_v0(RequestStruct):  # type: ignore[misc]  # noqa: N801
    FLEXIBLE_VERSION = True
    API_KEY = 66
    API_VERSION = 0
    RESPONSE_TYPE = ListTransactionsResponse_v0
    SCHEMA = Schema(("states", CompactArray(CompactString())), ("producer_ids", CompactArray(Int64)), _TAGS)


class OpenTransactionsRequest(Request[ListTransactionsRequest_v0]):  # type: ignore[misc]
    """Asks one broker for the open transactions that it coordinates."""

    API_KEY = 66

    def build(self, request_struct_class: type[ListTransactionsRequest_v0]) -> ListTransactionsRequest_v0:
        return request_struct_class(["Ongoing", "PrepareCommit", "PrepareAbort"], [], {})


async def open_transactions(client: Any) -> set[str]:
    """The transactional ids that a client's user may see and whose transaction is open; none before Kafka 3.0."""
    inner = inner_client(client)
    found: set[str] = set()
    for broker in inner.cluster.brokers():
        try:
            response = await inner.send(broker.nodeId, OpenTransactionsRequest())
        except NotImplementedError:
            continue
        if (error := for_code(response.error_code)) is not NoError:
            raise error
        found.update(transactional_id for transactional_id, *_ in response.transactions)
    return found
