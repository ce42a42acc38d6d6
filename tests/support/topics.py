"""Topics on the test broker, made, filled and read with librdkafka: a client that the worker does not use."""

import asyncio
import contextlib
import itertools
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.record.default_records import (
    _DefaultRecordBatchBuilderPy,  # the only builder that lets a header's key be no UTF-8
)
from aiokafka.structs import OffsetAndMetadata
from confluent_kafka import (
    Consumer,
    ConsumerGroupTopicPartitions,
    IsolationLevel,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import (
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewTopic,
    OffsetSpec,
    ResourceType,
)

from tests.support.waiting import wait_for

Headers = Sequence[tuple[str, bytes | None]]
CODECS = ("none", "gzip", "snappy", "lz4", "zstd")
CHANGES = itertools.count()  # of topics' configurations


@dataclass(frozen=True)
class Record:
    """One record, to send (offset -1) or as it was read."""

    value: bytes | None
    key: bytes | None = None
    headers: Headers = ()
    timestamp: int = 0
    topic: str = ""
    partition: int = -1
    offset: int = -1

    @property
    def place(self) -> tuple[str, int, int]:
        return self.topic, self.partition, self.offset


@dataclass(frozen=True)
class Topics:
    """The topics and the group of one test."""

    input: str
    output: str
    dead_letters: str
    group: str

    @classmethod
    def unique(cls) -> "Topics":
        name = uuid.uuid4().hex[:8]
        return cls(f"{name}.in", f"{name}.out", f"{name}.dead", f"{name}.group")


T = TypeVar("T")
ANSWER_S = 10
NO_LEADER = (
    KafkaError._NOENT,
    KafkaError._TRANSPORT,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.FENCED_LEADER_EPOCH,
    KafkaError.UNKNOWN_LEADER_EPOCH,
)
COORDINATOR_NOT_YET = (
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
    KafkaError.COORDINATOR_NOT_AVAILABLE,
    KafkaError.NOT_COORDINATOR,
)


@dataclass
class Kafka:
    """A client of one broker. Every call blocks until the broker has answered, and raises when it refuses."""

    bootstrap: str
    admin: AdminClient = field(init=False)
    _replaced: list[AdminClient] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.admin = AdminClient(self._config())

    def _config(self, **more: Any) -> dict[str, Any]:
        """Quiet, and quick to come back after a broker's restart."""
        return {
            "bootstrap.servers": self.bootstrap,
            "log_level": 0,
            "reconnect.backoff.max.ms": 500,
            "error_cb": lambda _: None,
            **more,
        }

    def create(self, name: str, partitions: int = 1, **config: object) -> None:
        """`config`'s names are written with underscores for dots. Records keep, however old a test makes them."""
        values = {"retention.ms": "-1"} | {key.replace("_", "."): str(value) for key, value in config.items()}
        self.admin.create_topics([NewTopic(name, partitions, 1, config=values)])[name].result(30)
        wait_for(lambda: name in self.names(), f"the broker to know {name}")

    def delete(self, name: str) -> None:
        self.admin.delete_topics([name])[name].result(30)
        wait_for(lambda: name not in self.names(), f"{name} to be gone")

    def create_all(self, topics: Topics, partitions: int = 4) -> None:
        for name in (topics.input, topics.output, topics.dead_letters):
            self.create(name, partitions)

    def names(self) -> set[str]:
        return set(self.admin.list_topics(timeout=30).topics)

    def partitions(self, topic: str) -> list[TopicPartition]:
        asked = TopicCollection([topic])
        description = self._answer(lambda admin: admin.describe_topics(asked)[topic].result(ANSWER_S), (), "a broker")
        return [TopicPartition(topic, partition.id) for partition in description.partitions]

    def set_config(self, topic: str, name: str, value: object) -> None:
        """Blocks until the topic's partitions have the value.

        The controller answers a moment before the broker has it, and the broker says so a moment before its partitions
        have it: that is certain once the broker says that it has the next change.
        """
        for each, wanted in ((name, str(value)), ("file.delete.delay.ms", str(60_000 + next(CHANGES)))):
            self._set_config(topic, each, wanted)

    def _set_config(self, topic: str, name: str, value: str) -> None:
        entry = ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET)
        resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[entry])
        self.admin.incremental_alter_configs([resource])[resource].result(30)

        def has_it() -> bool:
            asked = ConfigResource(ResourceType.TOPIC, topic)
            return bool(self.admin.describe_configs([asked])[asked].result(30)[name].value == value)

        wait_for(has_it, f"the broker to have {name} = {value}")

    def delete_before(self, topic: str, partition: int, offset: int) -> None:
        place = TopicPartition(topic, partition, offset)
        self._of_leaders(lambda admin: admin.delete_records([place])[place].result(ANSWER_S))

    def ends(self, topic: str, isolation: IsolationLevel = IsolationLevel.READ_UNCOMMITTED) -> dict[int, int]:
        """The offset after the last record of each partition, or the one before its oldest open transaction."""
        asked = {place: OffsetSpec.latest() for place in self.partitions(topic)}

        def ask(admin: AdminClient) -> dict[int, int]:
            answers = admin.list_offsets(asked, isolation_level=isolation)
            return {place.partition: answer.result(ANSWER_S).offset for place, answer in answers.items()}

        return self._of_leaders(ask)

    def _of_leaders(self, ask: Callable[[AdminClient], T]) -> T:
        """What partitions' leaders answer, once there are some: a controller on a busy machine takes a broker for dead."""
        return self._answer(ask, NO_LEADER, "partitions to have leaders")

    def _answer(self, ask: Callable[[AdminClient], T], not_yet: Sequence[int], what: str) -> T:
        """What brokers answer, asked again where they fail with one of the codes `not_yet`.

        A client that knew a broker before its restart may wait for it for ever: another takes its place then.
        """
        answers: list[T] = []

        def answered() -> bool:
            try:
                answers.append(ask(self.admin))
            except KafkaException as error:
                if error.args[0].code() not in not_yet:
                    raise
            except TimeoutError:
                self._replaced.append(self.admin)  # not destroyed beside what it still waits for
                self.admin = AdminClient(self._config())
            return bool(answers)

        wait_for(answered, what, 60)
        return answers[0]

    def count(self, *topics: str) -> int:
        """Records ever published to these topics (as long as there are no transactions in them)."""
        return sum(sum(self.ends(topic).values()) for topic in topics)

    def has_open_transaction(self, topic: str) -> bool:
        """Whether there are records that may still be committed or aborted."""
        return self.ends(topic, IsolationLevel.READ_COMMITTED) != self.ends(topic)

    def of_the_group(self, ask: Callable[[AdminClient], Any]) -> Any:
        """What the group's coordinator answers, once it has loaded; `ask` returns a future."""
        return self._answer(lambda admin: ask(admin).result(ANSWER_S), COORDINATOR_NOT_YET, "the group's coordinator")

    def committed(self, group: str, topic: str) -> dict[int, int]:
        """A group's committed offsets; a partition without one is left out.

        A consumer asks, without joining: where the coordinator has not loaded yet, librdkafka's AdminClient would end the
        process (https://github.com/confluentinc/librdkafka/issues/5315).
        """
        config = {"group.id": group, "enable.auto.commit": False, "isolation.level": "read_uncommitted"}
        consumer = Consumer(self._config(**config))
        partitions = self.partitions(topic)
        found: list[TopicPartition] = []

        def answered() -> bool:
            with contextlib.suppress(KafkaException):
                found.extend(consumer.committed(partitions, timeout=10))
            return bool(found)

        try:
            wait_for(answered, "the group's coordinator", 60)
        finally:
            consumer.close()
        return {place.partition: place.offset for place in found if place.offset >= 0}

    def commits(self, group: str) -> dict[int, OffsetAndMetadata]:
        """The commits of a group of one topic, by partition. aiokafka asks: librdkafka's metadata have no certain end."""

        async def asked() -> dict[int, OffsetAndMetadata]:
            client = AIOKafkaAdminClient(bootstrap_servers=self.bootstrap)
            await client.start()
            try:
                found = await client.list_consumer_group_offsets(group)
            finally:
                await client.close()
            return {tp.partition: commit for tp, commit in found.items()}

        return asyncio.run(asked())

    def members(self, group: str) -> set[str]:
        described = self.of_the_group(lambda admin: admin.describe_consumer_groups([group])[group])
        return {member.member_id for member in described.members}

    def coordinator(self, group: str) -> int:
        """The broker that coordinates a group."""
        described = self.of_the_group(lambda admin: admin.describe_consumer_groups([group])[group])
        return int(described.coordinator.id)

    def seek(self, group: str, topic: str, partition: int, offset: int) -> None:
        """Moves a group once its members have left it, and its coordinator has loaded."""
        self.committed(group, topic)
        wait_for(lambda: not self.members(group), "the group's members to be gone")
        wanted = ConsumerGroupTopicPartitions(group, [TopicPartition(topic, partition, offset)])
        self.admin.alter_consumer_group_offsets([wanted])[group].result(30)

    def send(self, topic: str, records: Iterable[Record], codec: str = "none", **config: Any) -> list[Record]:
        """Publishes the records and returns them with their places, in the order given."""
        sent: dict[int, Record] = {}
        producer = Producer(self._config(**{"compression.type": codec, "linger.ms": 5, **sending_config(), **config}))
        for number, record in enumerate(records):
            send_one(producer, topic, record, number, sent)
        assert producer.flush(60) == 0, "the records of the test could not be published"
        return [sent[number] for number in sorted(sent)]

    def begin_transaction(self, transactional_id: str) -> Producer:
        """A producer in a transaction that brokers leave open however long a test takes; by default it is a minute."""
        producer = Producer(self._config(**{"transactional.id": transactional_id, "transaction.timeout.ms": 600_000}))
        producer.init_transactions(60)
        producer.begin_transaction()
        return producer

    def read(self, topic: str, committed_only: bool = True) -> list[Record]:
        """Every record of a topic up to its present end, partition after partition.

        With `committed_only` it waits until each transaction that is open now has ended. A transaction's markers are written
        a moment after brokers have acknowledged its end, and one of a killed process is aborted when it is too old.
        """
        ends = self.ends(topic)
        consumer = Consumer(
            self._config(
                **{
                    "group.id": "reader-of-tests",
                    "enable.auto.commit": False,
                    "enable.partition.eof": True,
                    "auto.offset.reset": "earliest",  # where retention has taken the first
                    "isolation.level": "read_committed" if committed_only else "read_uncommitted",
                    "fetch.wait.max.ms": 50,
                }
            )
        )
        try:
            return sorted(read_to_ends(consumer, topic, ends), key=lambda record: record.place)
        finally:
            consumer.close()

    async def send_as_it_is(self, topic: str, partition: int, record: Record) -> None:
        """Publishes what other clients refuse: no timestamp (-1), or header names (with surrogate escapes) no UTF-8."""
        producer = AIOKafkaProducer(bootstrap_servers=self.bootstrap, enable_idempotence=False)
        await producer.start()
        try:
            batch = producer.create_batch()
            batch._builder = _DefaultRecordBatchBuilderPy(2, 0, 0, -1, -1, 0, 1_000_000)
            headers = [(AnyBytes(name), value) for name, value in record.headers]
            batch.append(timestamp=record.timestamp, key=record.key, value=record.value, headers=headers)
            await (await producer.send_batch(batch, topic, partition=partition))
        finally:
            await producer.stop()


class AnyBytes(str):
    """A header's name whose bytes are not UTF-8 where it has surrogate escapes."""

    __slots__ = ()

    def encode(self, *_: object) -> bytes:
        return str.encode(self, "utf-8", "surrogateescape")


class Load(threading.Thread):
    """Publishes numbered records, so many a second, until stopped; outlives an outage of the broker.

    By the clock: on a busy machine it comes in bursts, and there are no fewer.
    """

    def __init__(self, kafka: Kafka, topic: str, rate: float) -> None:
        super().__init__(daemon=True)
        config = {**sending_config(), "linger.ms": 5, "enable.idempotence": True}
        self._producer = Producer(kafka._config(**config))
        self._topic = topic
        self._rate = rate
        self._stopping = threading.Event()
        self._acknowledged: dict[int, Record] = {}
        self.offered = 0

    def run(self) -> None:
        began = time.monotonic()
        while not self._stopping.wait(1 / self._rate):
            due = (time.monotonic() - began) * self._rate
            while self.offered < due:
                send_one(self._producer, self._topic, numbered(self.offered), self.offered, self._acknowledged)
                self.offered += 1

    def end(self) -> None:
        """No more records; may be called again."""
        self._stopping.set()
        if self.is_alive():
            self.join()

    def stop(self) -> list[Record]:
        """Ends the load and returns everything that was published, with its places."""
        self.end()
        assert self._producer.flush(60) == 0, "the load of the test could not be published"
        return [self._acknowledged[number] for number in sorted(self._acknowledged)]


def sending_config() -> dict[str, Any]:
    return {
        "partitioner": "murmur2_random",  # Java's
        "message.max.bytes": 10_000_000,
        "queue.buffering.max.messages": 1_000_000,
    }


def send_one(producer: Producer, topic: str, record: Record, number: int, sent: dict[int, Record]) -> None:
    def delivered(error: KafkaError | None, message: Message) -> None:
        assert error is None, f"the record of a test was refused: {error}"
        arrived = as_record(message)  # without its headers: librdkafka gives them away with the record
        sent[number] = replace(arrived, headers=tuple(record.headers))

    place = {} if record.partition < 0 else {"partition": record.partition}
    producer.produce(
        topic,
        record.value,
        record.key,
        headers=list(record.headers),
        timestamp=record.timestamp,
        on_delivery=delivered,
        **place,
    )
    producer.poll(0)


def read_to_ends(consumer: Consumer, topic: str, ends: dict[int, int]) -> list[Record]:
    """Every record before these offsets, and perhaps some after them."""
    consumer.assign([TopicPartition(topic, partition, 0) for partition in ends])
    left = {partition for partition, end in ends.items() if end}
    records, deadline = [], time.monotonic() + 120
    while left:
        for message in consumer.consume(10_000, timeout=0.1):
            if message.error() is None:
                records.append(as_record(message))
                continue
            assert message.error().code() == KafkaError._PARTITION_EOF, message.error()
            if message.offset() >= ends[message.partition()]:  # else an open transaction is before the end
                left.discard(message.partition())
        assert time.monotonic() < deadline, f"{topic} cannot be read to its end: {left} of {ends}"
    return records


def as_record(message: Message) -> Record:
    return Record(
        message.value(),
        message.key(),
        tuple(message.headers() or ()),
        message.timestamp()[1],
        message.topic(),
        message.partition(),
        message.offset(),
    )


def numbered(number: int, keys: int = 50) -> Record:
    """The event of a number: a small JSON object, one of a few keys, one of a few texts."""
    value = f'{{"id": "{number}", "text": "событие номер {number % 500}, всё хорошо или не очень"}}'
    return Record(value.encode(), f"key {number % keys}".encode())


def repeated(items: Iterable[Any]) -> dict[Any, int]:
    """What occurs more than once, and how often."""
    return {item: times for item, times in Counter(items).items() if times > 1}


def codecs_of(log: bytes) -> set[str]:
    """The codecs of the record batches in a partition's log segment."""
    codecs, position = set(), 0
    while position + 61 <= len(log):
        attributes = int.from_bytes(log[position + 21 : position + 23], "big")
        codecs.add(CODECS[attributes & 7])
        position += 12 + int.from_bytes(log[position + 8 : position + 12], "big")
    return codecs
