"""What aiokafka 0.14 lacks: requests of our own, and changes to its private attributes. Importing this applies them.

Each item says why it is needed, and what aiokafka would have to change for it to be removed.
"""

import asyncio
import base64
import contextlib
import copy
import random
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import aiokafka.producer.producer
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.client import AIOKafkaClient, ConnectionGroup
from aiokafka.cluster import ClusterMetadata
from aiokafka.consumer import fetcher
from aiokafka.errors import (
    BrokerResponseError,
    GroupCoordinatorNotAvailableError,
    GroupLoadInProgressError,
    IllegalStateError,
    KafkaConnectionError,
    KafkaError,
    LeaderNotAvailableError,
    NodeNotReadyError,
    NoError,
    NotCoordinatorForGroupError,
    UnknownTopicOrPartitionError,
    for_code,
    kafka_errors,
)
from aiokafka.producer.message_accumulator import BatchBuilder, MessageAccumulator
from aiokafka.producer.sender import SendProduceReqHandler
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.group import JoinGroupRequest, LeaveGroupRequest, SyncGroupRequest
from aiokafka.protocol.offset import OffsetRequest, OffsetResetStrategy
from aiokafka.protocol.types import (
    Array,
    Boolean,
    Bytes,
    CompactArray,
    CompactString,
    Int16,
    Int32,
    Schema,
    String,
    TaggedFields,
)
from aiokafka.record.memory_records import MemoryRecords

from worker.runtime.tasks import cancelled, within

RETRY_S: Final = 0.1

# Topics' ids, and the names of all topics. aiokafka's newest Metadata is v5, which has no ids, and it parses the answer on
# the event loop, field by field: half a second for 60,000 partitions. Upstream would have to speak v10 (Kafka 2.8).

METADATA_TIMEOUT_S: Final = 3.0  # of one broker; then the next one is asked
LARGE_ANSWER_BYTES: Final = 100_000  # some milliseconds to parse
UNKNOWN_TOPIC: Final = 3
BESIDE: Final = "topics"  # a connection of its own, so that it and fetches do not wait for each other
_NO_ID: Final = bytes(16)
_FIXED_BYTES: Final = 14  # of a partition: error code, number, leader, leader's epoch
_TAGS: Final = ("tags", TaggedFields)


class Unparsed:
    """The rest of a message, as bytes."""

    @classmethod
    def encode(cls, value: bytes) -> bytes:
        return value

    @classmethod
    def decode(cls, data: Any) -> bytes:
        rest: bytes = data.read()
        return rest

    @classmethod
    def repr(cls, value: bytes) -> str:
        return f"{len(value)} bytes"


class MetadataResponse_v10(Response):  # type: ignore[misc]  # noqa: N801 - as aiokafka names them
    API_KEY = 3
    API_VERSION = 10
    SCHEMA = Schema(("body", Unparsed))


class MetadataRequest_v10(RequestStruct):  # type: ignore[misc]  # noqa: N801
    FLEXIBLE_VERSION = True  # request header v2, response header v1
    API_KEY = 3
    API_VERSION = 10
    RESPONSE_TYPE = MetadataResponse_v10
    SCHEMA = Schema(
        ("topics", CompactArray(("topic_id", Unparsed), ("name", CompactString()), _TAGS)),  # null: all topics
        ("allow_auto_topic_creation", Boolean),
        ("include_cluster_authorized_operations", Boolean),
        ("include_topic_authorized_operations", Boolean),
        _TAGS,
    )


class TopicsRequest(Request[MetadataRequest_v10]):  # type: ignore[misc]
    """Metadata of these topics, or of all (None), with their ids. Creates none."""

    API_KEY = 3

    def __init__(self, topics: Collection[str] | None) -> None:
        self.topics = topics

    def build(self, request_struct_class: type[MetadataRequest_v10]) -> MetadataRequest_v10:
        named: Any = None if self.topics is None else [(_NO_ID, name, {}) for name in self.topics]
        return request_struct_class(named, False, False, False, {})


class Topic(NamedTuple):
    """``topic_id`` as Kafka writes it, empty for none."""

    name: str
    error_code: int
    topic_id: str
    is_internal: bool


def inner(client: Any) -> AIOKafkaClient:
    """The client that an aiokafka consumer, producer or admin client sends its requests with; itself for such a one."""
    return getattr(client, "client", None) or getattr(client, "_client", client)


def use_topics(client: Any, topics: Iterable[str]) -> None:
    """Has a client ask for the metadata of these topics alone. Call it before ``start``; never blocks.

    Without topics of its own a client asks for those of the whole cluster. Upstream would have to take them as an option.
    """
    inner(client).set_topics(set(topics))


def known_brokers(client: Any) -> int:
    """How many brokers a started client knows. aiokafka's ``describe_cluster`` would ask for all partitions."""
    return len(inner(client).cluster.brokers())


async def partitions_of(client: Any, topic: str) -> set[int]:
    """The partitions of a topic. Waits, without end, for a topic that is not there; bound it."""
    partitions: set[int] = await inner(client)._wait_on_metadata(topic)
    return partitions


async def topic_ids(client: Any, topics: Collection[str]) -> dict[str, str]:
    """The ids of these topics, as one broker knows them. Unknown topics are left out; ids are empty before Kafka 2.8.

    Asks one broker after the other, METADATA_TIMEOUT_S each; raises a KafkaError when none answers.
    """
    try:
        found = await _described(inner(client), topics)
    except NotImplementedError:  # brokers before 2.8
        return dict.fromkeys(topics, "")
    return {topic.name: topic.topic_id for topic in found if topic.error_code != UNKNOWN_TOPIC}


async def agreed_topic_id(client: AIOKafkaClient, topic: str) -> str | None:
    """A topic's id as all brokers say that know it, and two at least where there are more; None while they do not agree.

    Empty where they have no ids. For what cannot be undone: one broker, cut off from its controller, may be far behind.
    Raises a KafkaError when too few answer within METADATA_TIMEOUT_S.
    """
    nodes = [broker.nodeId for broker in client.cluster.brokers()]
    answers = await asyncio.gather(*(_topic_id(client, node, topic) for node in nodes))
    known = [answer for answer in answers if answer is not None]
    if len(known) < max(1, min(2, len(nodes))):
        raise NodeNotReadyError
    ids = set(known) - {""}
    return None if len(ids) > 1 else next(iter(ids), "")


async def _topic_id(client: AIOKafkaClient, node: int, topic: str) -> str | None:
    """None where this broker does not answer, or does not know the topic."""
    try:
        found = await _described_by(client, node, [topic])
    except NotImplementedError:
        return ""
    except (KafkaError, OSError, TimeoutError):
        return None
    return next((each.topic_id for each in found if each.error_code != UNKNOWN_TOPIC), None)


async def topic_names(client: Any) -> list[str]:
    """The names of all topics that this user may describe, except Kafka's own. Raises as ``topic_ids``.

    There is no request for names alone, so brokers answer with every partition.
    """
    try:
        found = await _described(inner(client), None)
    except NotImplementedError:
        return list((await inner(client).fetch_all_metadata()).topics())
    return [topic.name for topic in found if not topic.error_code and not topic.is_internal]


async def _described(client: AIOKafkaClient, topics: Collection[str] | None) -> list[Topic]:
    nodes = [broker.nodeId for broker in client.cluster.brokers()]
    for node in random.sample(nodes, len(nodes)):
        try:
            return await _described_by(client, node, topics)
        except (KafkaError, OSError, TimeoutError):
            continue
    raise NodeNotReadyError


async def _described_by(client: AIOKafkaClient, node: int, topics: Collection[str] | None) -> list[Topic]:
    answer = await within(METADATA_TIMEOUT_S, client.send(node, TopicsRequest(topics), group=BESIDE))
    if len(answer.body) > LARGE_ANSWER_BYTES:
        return await asyncio.to_thread(parsed_topics, answer.body)
    return parsed_topics(answer.body)


def parsed_topics(body: bytes) -> list[Topic]:
    """The topics of a Metadata answer, version 10. Partitions are skipped, at some microseconds each."""
    data = _Bytes(body)
    data.skip(4)  # throttle time
    for _ in range(data.length()):
        data.skip(4)
        data.text()  # host
        data.skip(4)
        data.text()  # rack
        data.tags()
    data.text()  # the cluster's id
    data.skip(4)
    topics: list[Topic] = []
    for _ in range(data.length()):
        code = int.from_bytes(data.take(2), "big")
        name, topic_id, is_internal = data.text(), data.take(16), data.take(1) != b"\0"
        readable = "" if topic_id == _NO_ID else base64.urlsafe_b64encode(topic_id).decode().rstrip("=")
        topics.append(Topic(name, code, readable, is_internal))
        for _ in range(data.length()):
            data.skip(_FIXED_BYTES)
            for _ in range(3):  # replicas, those in sync, those offline
                data.skip(4 * data.length())
            data.tags()
        data.skip(4)
        data.tags()
    return topics


class _Bytes:
    """A cursor over bytes with Kafka's compact types: a length is written plus one, and 0 means null."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def skip(self, count: int) -> None:
        self._at += count

    def take(self, count: int) -> bytes:
        self._at += count
        return self._data[self._at - count : self._at]

    def number(self) -> int:
        value = shift = 0
        while (byte := self._data[self._at]) > 127:
            value |= (byte & 127) << shift
            shift += 7
            self._at += 1
        self._at += 1
        return value | byte << shift

    def length(self) -> int:
        return max(0, self.number() - 1)

    def text(self) -> str:
        return self.take(self.length()).decode()

    def tags(self) -> None:
        for _ in range(self.number()):
            self.number()
            self.skip(self.number())


BATCH_HEAD: Final = 61  # bytes before the records of a batch
AFTER_LENGTH: Final = 12  # its offset and its length


class FetchedBytes(MemoryRecords):  # type: ignore[misc]
    """A partition's part of a fetch, which keeps its bytes accessible: aiokafka's compiled batches hide theirs.

    Upstream would have to tell a batch's size, and to bound the headers of a record.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.data = data

    def first_records(self) -> bytearray:
        """The bytes of the first batch's records, still compressed if the batch is."""
        end = AFTER_LENGTH + int.from_bytes(self.data[8:AFTER_LENGTH], "big")
        return bytearray(self.data[BATCH_HEAD:end])


fetcher.MemoryRecords = FetchedBytes


NOT_THE_COORDINATOR = (GroupCoordinatorNotAvailableError, NotCoordinatorForGroupError, GroupLoadInProgressError)


async def end_offsets(
    consumer: AIOKafkaConsumer, partitions: Iterable[TopicPartition], timeout_s: float
) -> dict[TopicPartition, int | Exception]:
    """The end offset of each partition, or why it cannot be had, by one request to each leader; raises nothing.

    aiokafka's ``end_offsets`` fails as a whole where one partition has no leader. Upstream would have to answer for each.
    """
    cluster = consumer._client.cluster
    by_leader: dict[int | None, list[TopicPartition]] = defaultdict(list)
    for tp in partitions:
        by_leader[cluster.leader_for_partition(tp)].append(tp)
    asked = [_end_offsets_of(consumer, leader, tps, timeout_s) for leader, tps in by_leader.items()]
    return {tp: end for answer in await asyncio.gather(*asked) for tp, end in answer.items()}


async def _end_offsets_of(
    consumer: AIOKafkaConsumer, leader: int | None, partitions: list[TopicPartition], timeout_s: float
) -> Mapping[TopicPartition, int | Exception]:
    client = consumer._client
    try:
        if leader is None or leader < 0:  # the brokers are asked again, which also tells whether there are any
            if not await within(timeout_s, client.force_metadata_update()):
                raise KafkaConnectionError("no broker answers")
            missing = UnknownTopicOrPartitionError if leader is None else LeaderNotAvailableError
            return {tp: missing() for tp in partitions}
        by_topic: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for tp in partitions:
            by_topic[tp.topic].append((tp.partition, OffsetResetStrategy.LATEST))
        request = OffsetRequest(-1, consumer._fetcher._isolation_level, list(by_topic.items()))
        response = await within(timeout_s, client.send(leader, request))
    except (KafkaError, OSError, TimeoutError) as error:
        return dict.fromkeys(partitions, error)
    found: dict[TopicPartition, int | Exception] = {}
    for topic, answers in response.topics:
        for partition, code, _, offset, *_ in answers:
            found[TopicPartition(topic, partition)] = for_code(code)() if code else offset
    if any(getattr(end, "invalid_metadata", False) for end in found.values()):
        client.force_metadata_update()
    return found


class CoordinatorAnswers:
    """When the group's coordinator last answered a consumer, by ``clock``. Create it once the consumer has started.

    Who says that it is not the coordinator, or not yet, has not answered; nor has one from whom a request comes back failed.
    aiokafka keeps the time of the last good heartbeat to itself. Upstream would have to offer it.
    """

    def __init__(self, consumer: AIOKafkaConsumer, clock: Callable[[], float] = time.monotonic) -> None:
        self.at = clock()
        self.has_answered = False
        self.is_joining = False  # waits for a request that the coordinator answers only when every member has joined
        self._clock = clock
        coordinator = consumer._coordinator
        if coordinator is not None:
            self._send = coordinator._send_req
            coordinator._send_req = self._noted

    async def _noted(self, request: Any) -> Any:
        is_join = isinstance(request, JoinGroupRequest | SyncGroupRequest)
        self.is_joining = self.is_joining or is_join
        try:
            response = await self._send(request)
        finally:
            if is_join:
                self.is_joining = False
        code = getattr(
            response, "error_code", GroupCoordinatorNotAvailableError.errno
        )  # a commit's are its partitions'
        if for_code(code) not in NOT_THE_COORDINATOR:
            self.has_answered, self.at = True, self._clock()
        return response


# Upstream would have to end the consumer, or to raise in ``getmany``, where a task of its own fails.


def background_tasks(consumer: AIOKafkaConsumer) -> "dict[str, asyncio.Future[Any]]":
    """By name, the tasks that a started consumer needs to the end. If one fails, aiokafka only logs it."""
    return {
        "fetch": consumer._fetcher.error_future,
        "coordination": consumer._coordinator._coordination_task,
        "metadata": consumer._client._sync_task,
    }


# Static membership. Upstream would have to send the instance id with Heartbeat (v3) and OffsetCommit (v7), to know error
# 82, and to take it as final.


class FencedInstanceId(BrokerResponseError):  # type: ignore[misc]
    """Another member has joined the group with the same ``group_instance_id``."""

    errno = 82
    message = "FENCED_INSTANCE_ID"
    description = "Another member has joined the group with the same group instance id."


kafka_errors[FencedInstanceId.errno] = FencedInstanceId


class _DescribeGroupsResponse(Response):  # type: ignore[misc]
    API_KEY = 15
    API_VERSION = 4
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "groups",
            Array(
                ("error_code", Int16),
                ("group", String("utf-8")),
                ("state", String("utf-8")),
                ("protocol_type", String("utf-8")),
                ("protocol", String("utf-8")),
                (
                    "members",
                    Array(
                        ("member_id", String("utf-8")),
                        ("group_instance_id", String("utf-8")),
                        ("client_id", String("utf-8")),
                        ("client_host", String("utf-8")),
                        ("member_metadata", Bytes),
                        ("member_assignment", Bytes),
                    ),
                ),
                ("authorized_operations", Int32),
            ),
        ),
    )


class _DescribeGroupsStruct(RequestStruct):  # type: ignore[misc]
    API_KEY = 15
    API_VERSION = 4
    RESPONSE_TYPE = _DescribeGroupsResponse
    SCHEMA = Schema(("groups", Array(String("utf-8"))), ("include_authorized_operations", Boolean))


class DescribeGroup(Request[_DescribeGroupsStruct]):  # type: ignore[misc]
    """A group's members with their instance ids, which aiokafka's versions of this request do not tell. Kafka 2.4."""

    API_KEY = 15

    def __init__(self, group: str) -> None:
        self._group = group

    def build(self, request_struct_class: type[_DescribeGroupsStruct]) -> _DescribeGroupsStruct:
        return request_struct_class([self._group], False)


class InstanceIdTaken(KafkaError):  # type: ignore[misc]
    """Another member of the group holds this process's ``group_instance_id`` by now."""


class StaticMember:
    """A ``group_instance_id`` for all of a process's consumers: a replaced process never replaces its successor.

    Kafka gives the id to the member that joined with it last. The previous member then gets UNKNOWN_MEMBER_ID for
    heartbeats and commits, which in aiokafka carry no instance id, and aiokafka at once joins again as a new member. So
    before it joins without a member id, this asks who holds the instance id. A join with a member id gets error 82.
    """

    def __init__(self, instance_id: str) -> None:
        self._instance_id = instance_id
        self._member_id = ""  # with which this process was last known to hold the id; "" if none, or not known

    def guard(self, consumer: AIOKafkaConsumer) -> None:
        """Guards a consumer that has started and not yet subscribed. Its ``getmany`` then raises InstanceIdTaken."""
        coordinator = consumer._coordinator
        rejoin = coordinator._do_rejoin_group

        async def unless_replaced(subscription: Any) -> bool:
            if not await self._may_join(coordinator):
                return False
            try:
                is_joined: bool = await rejoin(subscription)
            except KafkaError as error:
                if FencedInstanceId.__name__ in str(error):  # aiokafka has turned it into a message
                    raise InstanceIdTaken from error
                raise
            finally:
                self._member_id = coordinator.member_id or self._member_id
            return is_joined

        coordinator._do_rejoin_group = unless_replaced

    async def _may_join(self, coordinator: Any) -> bool:
        """False: try again. Raises InstanceIdTaken, and KafkaErrors that are not retriable."""
        if coordinator.member_id:
            return True  # with its member id: the group refuses it if another has taken its place
        if self._member_id:
            try:
                holder = await self._holder(coordinator)
            except KafkaError as error:
                if not error.retriable:
                    raise
                coordinator.coordinator_dead()  # so that it is looked up again
                await asyncio.sleep(RETRY_S)
                return False
            if holder and holder != self._member_id:
                raise InstanceIdTaken
        # If the answer to this join is lost, this process holds the instance id with a member id that it does not know.
        self._member_id = ""
        return True

    async def _holder(self, coordinator: Any) -> str:
        """The member id that has the instance id now; "" for none. Raises KafkaError."""
        try:
            response = await coordinator._send_req(DescribeGroup(coordinator.group_id))
        except NotImplementedError:  # Kafka 2.3 has static members, and does not tell who they are
            return ""
        ((code, _, _, _, _, members, _),) = response.groups
        if (error := for_code(code)) is not NoError:
            raise error
        return next((member for member, instance, *_ in members if instance == self._instance_id), "")


SILENT_BROKERS_S: Final = 60.0
LEAST_SHARE: Final = 1 / 6  # of it, for who has asked for nothing in so long


# Brokers under other addresses. Upstream would have to bootstrap again, as the Java client does (KIP-899, KIP-1102).


@dataclass(slots=True)
class _Client:
    """What a client of aiokafka's has to remember besides."""

    metadata_due_at: float = 0.0
    heard_at: float = 0.0
    locks: defaultdict[object, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))


_clients: WeakKeyDictionary[AIOKafkaClient, _Client] = WeakKeyDictionary()
_ask_known_brokers = AIOKafkaClient._metadata_update


async def update_metadata(
    client: AIOKafkaClient, cluster: ClusterMetadata, topics: Iterable[str] | None, timeout_s: float = SILENT_BROKERS_S
) -> bool:
    """Asks the brokers that a client knows for metadata, and ``bootstrap_servers`` where none of them answers.

    That is at once where all refuse connections, and after ``timeout_s`` without a word where they are silent. aiokafka asks
    ``bootstrap_servers`` at the start alone, and waits for ever once all brokers have other addresses. The client stays the
    same: a consumer its group's member, a producer with its sequence numbers. False: nobody answers.

    Two requests are ``retry_backoff_ms`` apart, as Kafka's own client has it: aiokafka asks thousands of times a second for
    as long as a batch's partition has no leader.
    """
    known = _clients.setdefault(client, _Client())
    await asyncio.sleep(max(0.0, known.metadata_due_at - time.monotonic()))
    known.metadata_due_at = time.monotonic() + client._retry_backoff
    known.heard_at = max([known.heard_at, *(connection._last_action for connection in client._conns.values())])
    left_s = known.heard_at + timeout_s - time.monotonic()
    try:
        if await within(max(left_s, timeout_s * LEAST_SHARE), _ask_known_brokers(client, cluster, topics)):
            return True
    except TimeoutError:
        pass
    newcomer = copy.copy(client)  # the same settings, and nothing of what is known or connected
    newcomer.cluster, newcomer._conns = ClusterMetadata(), {}
    newcomer._sync_task = asyncio.current_task()  # or it would start one
    try:
        await newcomer.bootstrap()
        if not await _ask_known_brokers(newcomer, cluster, topics):
            return False
    except KafkaError:
        return False
    finally:
        _disconnect(newcomer._conns.values())
    moved = [connection for (node, _), connection in client._conns.items() if not _leads_to(node, connection, client)]
    _disconnect(moved)  # requests there fail now, not when they time out
    return True


def _leads_to(node: Any, connection: Any, client: AIOKafkaClient) -> bool:
    broker = client.cluster.broker_metadata(node)
    return broker is not None and (broker.host, broker.port) == (connection.host, connection.port)


_connection_to = AIOKafkaClient._get_conn


async def connection_to(
    client: AIOKafkaClient, node: Any, *, group: Any = ConnectionGroup.DEFAULT, **options: Any
) -> Any:
    """A client's connection to a broker, which is opened if there is none; None if that fails.

    It has one lock for each broker and address. aiokafka has one for all brokers: a caller that waits for a silent broker
    holds up all others, and they then go to the old address. Upstream would need a lock for each, too.
    """
    connection = client._conns.get((node, group))
    if connection is not None and connection.connected():
        return connection
    locks = _clients.setdefault(client, _Client()).locks
    while True:
        broker = client.cluster.broker_metadata(node)
        async with locks[node, group, broker]:
            if broker == client.cluster.broker_metadata(node):
                return await _connection_to(client, node, group=group, **options)


AIOKafkaClient._metadata_update = update_metadata
AIOKafkaClient._get_conn = connection_to
AIOKafkaClient._get_conn_lock = contextlib.nullcontext()


# What an interrupted stop leaves behind. Upstream would have to close the inner client and cancel tasks in a `finally`.


async def end_remains(client: Any) -> None:
    """Ends the remaining tasks and connections of a producer, consumer or admin client whose stop was cut short."""
    within_it = inner(client)
    names = ("_sender", "_message_accumulator", "_coordinator", "_fetcher")
    parts = [part for part in (within_it, *(getattr(client, name, None) for name in names)) if part is not None]
    await cancelled([task for task in asyncio.all_tasks() if _runs_a_method_of(parts, task)])
    _disconnect(within_it._conns.values())
    within_it._conns.clear()


def _runs_a_method_of(parts: list[Any], task: asyncio.Task[Any]) -> bool:
    frame = getattr(task.get_coro(), "cr_frame", None)
    return frame is not None and any(frame.f_locals.get("self") is part for part in parts)


def _disconnect(connections: Iterable[Any]) -> None:
    """At once, without waiting for what is still to be written."""
    for connection in list(connections):
        connection.close()
        transport = connection._protocol and connection._protocol._transport
        if transport is not None:
            transport.abort()


# Batches that may have been written. Upstream would never have to give up a batch that an idempotent producer has sent.


class PatientAccumulator(MessageAccumulator):  # type: ignore[misc]
    """Keeps batches, for as long as it takes, until their partition has a leader.

    aiokafka gives a batch up after ``request_timeout_ms``, though it may have been written before the leader went: sent
    again with other sequence numbers, it would be there twice. With this, that time runs only while the metadata do not
    have the partition at all, and in transactions, whose abort would wait, too.
    """

    def drain_by_nodes(self, *arguments: Any, **options: Any) -> Any:
        if not (self._txn_manager and self._txn_manager.transactional_id):
            for tp, batches in self._batches.items():
                if self._cluster.leader_for_partition(tp) is not None:
                    batches[0]._ctime = time.monotonic()
        return super().drain_by_nodes(*arguments, **options)


aiokafka.producer.producer.MessageAccumulator = PatientAccumulator


NOT_WRITTEN: Final = (NodeNotReadyError, UnknownTopicOrPartitionError)  # not sent; or refused, or gone with its topic
_in_doubt: WeakSet[BatchBuilder] = WeakSet()
_can_retry = SendProduceReqHandler._can_retry


def can_retry(handler: SendProduceReqHandler, error: KafkaError, batch: Any) -> bool:
    """Notes the batches that may have been written by a try whose answer was lost, or said so."""
    if error.retriable and not isinstance(error, NOT_WRITTEN):
        _in_doubt.add(batch._builder)
    may_be: bool = _can_retry(handler, error, batch)
    return may_be


SendProduceReqHandler._can_retry = can_retry


def may_be_written(batch: BatchBuilder, error: BaseException) -> bool:
    """Whether a batch that failed for good may be in its partition: that it was refused tells of its last try alone."""
    is_refused = isinstance(error, BrokerResponseError) and not error.retriable
    return batch in _in_doubt or (batch._buffer is not None and not is_refused)


# Partitions that are gone.

LOOK_S: Final = 1.0


async def is_gone(producer: AIOKafkaProducer, tp: TopicPartition, unless: asyncio.Future[object]) -> bool | None:
    """Whether a topic is known, and has no such partition any more, by a broker's answer that is asked for now.

    None where none comes within a second, or ``unless`` is done before. Upstream would have to ask for metadata after an
    AddPartitionsToTxn that names an unknown partition, which it repeats without an end.
    """
    update = producer.client.force_metadata_update()
    await asyncio.wait({unless, update}, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
    if unless.done() or not update.done() or not update.result():
        return None
    partitions = producer.client.cluster.partitions_for_topic(tp.topic)
    return partitions is not None and tp.partition not in partitions


def give_up(producer: AIOKafkaProducer, tp: TopicPartition) -> None:
    """Fails what waits for a partition that is gone, but for batches that may have been written: brokers may be wrong.

    Those wait for as long as aiokafka has it, which is ``request_timeout_ms``. Upstream would have to fail the others once
    its metadata say it.
    """
    accumulator = producer._message_accumulator
    while (waiting := accumulator._batches.get(tp)) and waiting[0]._builder not in _in_doubt:
        accumulator._pop_batch(tp).failure(UnknownTopicOrPartitionError(f"{tp.topic}-{tp.partition}"))


# The group, as the source needs it.


async def leave_group(consumer: AIOKafkaConsumer, timeout_s: float) -> None:
    """Leaves the group on another connection than the group's own, which a join under way blocks.

    Does nothing for a static member, which keeps its place, and where no coordinator is known. Raises KafkaError, OSError
    and TimeoutError. Upstream would have to do it in ``stop``, whose LeaveGroup waits behind the JoinGroup.
    """
    coordinator = consumer._coordinator
    if coordinator is None or coordinator.coordinator_id is None or coordinator._group_instance_id is not None:
        return
    request = LeaveGroupRequest(coordinator.group_id, coordinator.member_id)
    sending = consumer._client.send(coordinator.coordinator_id, request, group=ConnectionGroup.DEFAULT)
    await within(timeout_s, sending)


async def confirm_membership(consumer: AIOKafkaConsumer, timeout_s: float) -> None:
    """Returns if the coordinator says that the consumer is a member of its group, by a heartbeat that is sent now.

    Raises IllegalStateError where it is none any more, GroupCoordinatorNotAvailableError where it is not known, and
    TimeoutError. Upstream would have to offer it.
    """
    coordinator = consumer._coordinator
    if await within(timeout_s, coordinator._do_heartbeat()):
        return
    if coordinator.generation <= 0:
        raise IllegalStateError("no longer a member of the group")
    raise GroupCoordinatorNotAvailableError


def knows_topic(client: Any, topic: str) -> bool:
    """Whether the metadata that a started client has got list the topic, with partitions. Never blocks."""
    return bool(inner(client).cluster.partitions_for_topic(topic))
