"""Offsets in transactions: the brokers take them from a member of the group alone, in the generation of its assignment."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import IllegalGenerationError, KafkaError, ProducerFenced, UnknownMemberIdError

from tests.support.broker import Broker
from tests.support.topics import Kafka, Topics
from tests.support.waiting import wait_for
from worker.core.events import Outgoing
from worker.kafka import transactional_sink as module
from worker.kafka.aiokafka_compat.group import FencedInstanceId
from worker.kafka.aiokafka_compat.transactions import Membership, TransactionalProducer
from worker.kafka.connection import Connection
from worker.kafka.consumer import Consumer
from worker.kafka.producer_records import ProducerRecord
from worker.kafka.transactional_sink import TransactionalSink, TransactionFenced
from worker.telemetry.health import Health
from worker.telemetry.metrics import Metrics

pytestmark = pytest.mark.kafka

METADATA = "topic_id=x"


class Group:
    """Members of one group, and producers whose transactional ids begin with its name; all end with the test."""

    def __init__(self, kafka: Kafka, topics: Topics) -> None:
        kafka.create_all(topics, 2)
        self.kafka = kafka
        self.topics = topics
        self.first, self.second = (TopicPartition(topics.input, number) for number in range(2))
        self._opened: list[Consumer | AIOKafkaProducer] = []

    async def join(self, instance_id: str | None = None) -> Consumer:
        member = Consumer(
            bootstrap_servers=self.kafka.bootstrap,
            group_id=self.topics.group,
            group_instance_id=instance_id,
            enable_auto_commit=False,
            heartbeat_interval_ms=200,
            session_timeout_ms=60_000,  # the tests themselves block the event loop for a while, and with it heartbeats
        )
        member.subscribe([self.topics.input])
        self._opened.append(member)
        await member.start()
        await until(member.assignment)
        return member

    async def in_transaction(self, transactional_id: str = "id") -> TransactionalProducer:
        """A producer that has published one record in a transaction which is still open."""
        producer = TransactionalProducer(
            bootstrap_servers=self.kafka.bootstrap, transactional_id=f"{self.topics.group}/{transactional_id}"
        )
        self._opened.append(producer)
        await producer.start()
        await producer.begin_transaction()
        await producer.send_and_wait(self.topics.output, b"result", partition=0)
        return producer

    def results(self) -> int:
        return len(self.kafka.read(self.topics.output))

    async def committed(self) -> dict[int, int]:
        """The group's offsets. A transaction's end is written to them a moment after it is acknowledged."""
        reader = Consumer(bootstrap_servers=self.kafka.bootstrap, group_id=self.topics.group, enable_auto_commit=False)
        await reader.start()
        try:
            reader.assign([self.first, self.second])
            for tp in (self.first, self.second):
                await until_stable(reader, tp)
        finally:
            await reader.stop()
        return self.kafka.committed(self.topics.group, self.topics.input)

    async def close(self) -> None:
        for client in reversed(self._opened):
            await client.stop()


@pytest.fixture
async def group(kafka: Kafka, topics: Topics) -> AsyncIterator[Group]:
    group = Group(kafka, topics)
    yield group
    await group.close()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - of what aiokafka does
            await asyncio.sleep(0.02)


def membership(consumer: Consumer) -> Membership:
    member = consumer.membership()
    assert member is not None
    return member


async def test_a_rejoin_between_begin_and_commit(group: Group) -> None:
    """The member is still one, and knows the new generation: its records are of the old one, so nothing is committed."""
    member = await group.join()
    of_the_assignment = membership(member)
    producer = await group.in_transaction()
    await group.join()
    await until(lambda: membership(member).generation > of_the_assignment.generation and member.assignment())
    with pytest.raises(IllegalGenerationError):
        await producer.add_offsets({group.first: (1, METADATA)}, of_the_assignment)
    await producer.abort_transaction()
    assert (group.results(), await group.committed()) == (0, {})

    await producer.begin_transaction()
    await producer.send_and_wait(group.topics.output, b"result", partition=0)
    await producer.add_offsets({group.first: (1, METADATA)}, membership(member))
    await producer.commit_transaction()
    assert (group.results(), await group.committed()) == (1, {0: 1})
    assert (await member.committed_offsets([group.first]))[group.first].metadata == METADATA


async def test_a_member_that_has_left(group: Group) -> None:
    member = await group.join()
    left = membership(member)
    producer = await group.in_transaction()
    await group.join()
    await member.stop()
    await refused(UnknownMemberIdError, group, producer, left)


async def test_a_member_whose_instance_id_another_has_taken(group: Group) -> None:
    """In the same generation."""
    replaced = membership(await group.join("instance"))
    producer = await group.in_transaction()
    await group.join("instance")
    await refused(FencedInstanceId, group, producer, replaced)


async def refused(error: type[KafkaError], group: Group, producer: TransactionalProducer, member: Membership) -> None:
    with pytest.raises(error):
        await producer.add_offsets({group.first: (1, METADATA)}, member)
    await producer.abort_transaction()
    assert (group.results(), await group.committed()) == (0, {})


async def test_no_generation_is_never_sent(group: Group) -> None:
    """Brokers take it from anyone, and a consumer has none as soon as a heartbeat was refused."""
    member = await group.join()
    member._coordinator.reset_generation()
    assert member.membership() is None
    for generation, member_id in ((-1, "member"), (1, "")):
        with pytest.raises(ValueError, match="no member of the group"):
            Membership(group.topics.group, generation, member_id)


async def test_an_offset_of_an_open_transaction_is_not_stable(group: Group) -> None:
    """That of other partitions is, and after the transaction's end this one, too."""
    member = await group.join()
    producer = await group.in_transaction()
    await producer.add_offsets({group.first: (7, METADATA)}, membership(member))
    both = [group.first, group.second]
    stable = await member.committed_offsets(both, require_stable=True)
    assert {tp: commit.offset for tp, commit in stable.items()} == {group.second: -1}
    assert (await member.committed_offsets(both))[group.first].offset == -1
    await producer.commit_transaction()
    await until_stable(member, group.first)
    stable = await member.committed_offsets(both, require_stable=True)
    assert (stable[group.first].offset, stable[group.first].metadata) == (7, METADATA)


async def until_stable(member: Consumer, tp: TopicPartition) -> None:
    async with asyncio.timeout(60):
        while tp not in await member.committed_offsets([tp], require_stable=True):  # noqa: ASYNC110 - of the brokers
            await asyncio.sleep(0.02)


async def test_another_producer_of_the_same_id_ends_what_is_open_and_fences(
    broker: Broker, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the offsets that it holds, at once: a restarted static member need not wait for the transaction's timeout."""
    monkeypatch.setattr(module, "TRANSACTION_TIMEOUT_S", 120.0)
    member = await group.join()
    sinks = [sink(broker, group) for _ in range(2)]
    await sinks[0].open()
    record = ProducerRecord(group.topics.output, Outgoing(b"key", b"result", [], None), 0)
    await sinks[0].publish([record])
    producer = sinks[0]._producer
    await producer.add_offsets({group.first: (1, METADATA)}, membership(member))  # type: ignore[union-attr]
    assert not await member.committed_offsets([group.first], require_stable=True)

    async with asyncio.timeout(60):
        await sinks[1].open()
    await until_stable(member, group.first)
    stable = await member.committed_offsets([group.first], require_stable=True)
    assert stable[group.first].offset == -1
    with pytest.raises(TransactionFenced, match=f"another process uses the transactional id {group.topics.group}/id"):
        await sinks[0].publish([record._replace(origin=1)] * 2)
    await sinks[1].publish([record])
    await sinks[1].commit({group.first: (1, METADATA)}, membership(member))
    assert (group.results(), await group.committed()) == (1, {0: 1})
    for each in sinks:
        await each.close(5)


def sink(broker: Broker, group: Group) -> TransactionalSink:
    return TransactionalSink(
        Connection((broker.bootstrap,)),
        transactional_id=f"{group.topics.group}/id",
        limits={},
        metrics=Metrics("test"),
        health=Health(),
    )


@pytest.mark.parametrize("step", ["publish", "commit"])
async def test_a_transaction_that_brokers_have_aborted_for_its_age(
    broker: Broker, group: Group, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Their error 47 (INVALID_PRODUCER_EPOCH) is the one by which another process fences this one."""
    monkeypatch.setattr(module, "TRANSACTION_TIMEOUT_S", 3.0)
    monkeypatch.setattr(module, "DEADLINE_S", 120.0)
    member = await group.join()
    late = sink(broker, group)
    await late.open()
    record = ProducerRecord(group.topics.output, Outgoing(b"key", b"result", [], None), 0)
    await late.publish([record])
    await asyncio.to_thread(
        wait_for, lambda: not group.kafka.has_open_transaction(group.topics.output), "the brokers to abort it", 60
    )
    going_on = (
        late.publish([record]) if step == "publish" else late.commit({group.first: (1, METADATA)}, membership(member))
    )
    with pytest.raises(TransactionFenced, match="it was open for more than 3 s") as raised:
        await going_on
    assert isinstance(raised.value.__cause__, ProducerFenced)
    assert (group.results(), await group.committed()) == (0, {})
    monkeypatch.setattr(module, "TRANSACTION_TIMEOUT_S", 60.0)  # nobody is to abort the next one
    await late.open()
    await late.publish([record])
    await late.commit({group.first: (1, METADATA)}, membership(member))
    assert (group.results(), await group.committed()) == (1, {0: 1})
    await late.close(5)


async def test_a_stream_of_records_that_are_too_large_costs_few_requests_although_the_limit_is_not_known(
    broker: Broker, group: Group
) -> None:
    """The first of them is found by halving its batch. Records of its size and more are not sent then, for a minute."""
    await asyncio.to_thread(group.kafka.set_config, group.topics.output, "max.message.bytes", 20_000)
    publishing = sink(broker, group)
    await publishing.open()
    values = [b"x" * (30_000 if number % 50 == 7 else 10) for number in range(500)]
    records = [
        ProducerRecord(group.topics.output, Outgoing(b"%d" % number, value, [], None), 0)
        for number, value in enumerate(values)
    ]
    for _ in range(3):
        answers = await publishing.publish(records)
        assert [number for number, reason in enumerate(answers) if reason] == [*range(7, 500, 50)]
    refusals = publishing._metrics.kafka_errors.labels("publish")._value.get()
    assert refusals < 40, "30 records of 1,500, each found by halving, would be some 200"
    await publishing.close(5)
