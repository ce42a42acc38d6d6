"""The life of Kafka's clients: brokers under other addresses, partitions without a leader, and what a stop leaves behind."""

import asyncio
import gc
import socket
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from aiokafka import TopicPartition
from aiokafka.client import AIOKafkaClient
from aiokafka.structs import BrokerMetadata
from confluent_kafka.admin import NewTopic

from tests.chaos.proxy import Proxy
from tests.conftest import broker_or_reason
from tests.integration.test_replay import command, dead_letter, trace
from tests.support.broker import Broker, Extras, UnavailableError, free_port
from tests.support.process import COSTLESS, Workers, environment, workers_in
from tests.support.scenario import wait_until_committed
from tests.support.topics import Kafka, Topics, numbered
from tests.support.two_brokers import two_nodes
from tests.support.waiting import wait_for
from worker.core.events import Outgoing
from worker.kafka.aiokafka_compat.connections import update_metadata
from worker.kafka.aiokafka_compat.transactions import Membership
from worker.kafka.clients import stop_client
from worker.kafka.connection import Connection
from worker.kafka.consumer import Consumer
from worker.kafka.producer_records import ProducerRecord
from worker.kafka.sink import Sink
from worker.kafka.transactional_sink import TransactionalSink, TransactionFailed
from worker.runtime.tasks import cancel_all, within
from worker.telemetry.health import Health
from worker.telemetry.metrics import Metrics

pytestmark = pytest.mark.kafka


# Brokers under other addresses.


class Service:
    """A broker that is known by one name, `bootstrap`. Clients are sent to an old address, and after `move` to a new one."""

    def __init__(self, broker: Broker, old_port: int, gate_port: int) -> None:
        self.kafka = Kafka(broker.bootstrap)
        self._new = broker.bootstrap
        self.old_address = Proxy(gate_port, f"127.0.0.1:{old_port}")
        self._name = Proxy(free_port(), f"127.0.0.1:{old_port}")

    @property
    def bootstrap(self) -> str:
        return f"127.0.0.1:{self._name.port}"

    def move(self, **what_is_left: bool) -> None:
        """The name leads to the new address, and the old one does what the proxy is told."""
        port = self._name.port
        self._name.close()
        self._name = Proxy(port, self._new)
        self.old_address.set(**what_is_left)

    def refuse(self) -> None:
        for proxy in (self._name, self.old_address):
            proxy.set(refuses=True)

    def close(self) -> None:
        self._name.close()
        self.old_address.close()


@pytest.fixture(scope="module")
def two_addresses(request: pytest.FixtureRequest) -> Iterator[tuple[Broker, int, int]]:
    """A broker with a second listener, and where that one sends clients to."""
    port, gate = free_port(), free_port()
    extras = Extras(listeners={"OLD": ("PLAINTEXT", port)}, advertised={"OLD": f"127.0.0.1:{gate}"})
    broker = broker_or_reason(request.config, controllable=True, extras=extras)
    yield broker, port, gate
    broker.close()


@pytest.fixture
def service(two_addresses: tuple[Broker, int, int]) -> Iterator[Service]:
    service = Service(*two_addresses)
    yield service
    service.close()


@pytest.fixture
def workers_of_service(service: Service, tmp_path: Path) -> Iterator[Workers]:
    with workers_in(service.bootstrap, Path("builtin"), tmp_path, COSTLESS, is_forked=True) as workers:
        yield workers


def test_workers_find_brokers_under_other_addresses(service: Service, workers_of_service: Workers) -> None:
    """In both deliveries; the same process, still a member of its group."""
    both = {delivery: Topics.unique() for delivery in ("at-least-once", "exactly-once")}
    started = []
    for delivery, topics in both.items():
        service.kafka.create_all(topics, 2)
        started.append(workers_of_service.start(topics, delivery=delivery))
    for worker, topics in zip(started, both.values(), strict=True):
        worker.wait_until_assigned(2)
        service.kafka.send(topics.input, map(numbered, range(10)))
        wait_until_committed(service.kafka, topics)  # what is published and not committed would come twice
        assert len(service.kafka.read(topics.output)) == 10
    service.move(refuses=True)
    for topics in both.values():
        service.kafka.send(topics.input, map(numbered, range(10, 20)))
    for worker, topics in zip(started, both.values(), strict=True):
        wait_until_committed(service.kafka, topics)
        assert len(service.kafka.read(topics.output)) == 20
        worker.wait_until_ready()
        assert worker.terminate() == 0


def test_a_replay_finds_brokers_under_other_addresses(service: Service, topics: Topics) -> None:
    letters = 4_000
    service.kafka.create_all(topics, 1)
    service.kafka.send(topics.dead_letters, (dead_letter(number, topics) for number in range(letters)))
    service.old_address.set(delay_s=0.05)  # so that it takes a while
    begin = command(Kafka(service.bootstrap), topics)
    with subprocess.Popen(begin, env=environment(), stdout=subprocess.PIPE, text=True) as replay:
        try:
            wait_for(lambda: service.kafka.count(topics.input) > 0, "the first letters")
            service.move(refuses=True)
            printed, _ = replay.communicate(timeout=150)
        finally:
            replay.kill()
    assert replay.returncode == 0, printed
    assert sorted(map(trace, service.kafka.read(topics.input))) == list(range(letters))


async def test_brokers_that_are_silent_at_their_old_addresses_are_found_at_the_new_ones(
    service: Service, topics: Topics
) -> None:
    """Connections to them stay open, and what was asked there does not wait for them."""
    service.kafka.create_all(topics, 1)
    client = AIOKafkaClient(bootstrap_servers=service.bootstrap, request_timeout_ms=60_000)
    await client.bootstrap()
    try:
        await client._wait_on_metadata(topics.input)
        old = [connection for connection in client._conns.values() if connection.connected()]
        service.move(swallows=True)
        assert await update_metadata(client, client.cluster, [topics.input], timeout_s=0.2)
        [broker] = client.cluster.brokers()
        assert f"{broker.host}:{broker.port}" == service.kafka.bootstrap
        assert client.cluster.partitions_for_topic(topics.input) == {0}
        assert old
        assert not any(connection.connected() for connection in old)
    finally:
        service.old_address.set()
        await client.close()


async def test_what_is_known_of_brokers_stays_where_none_answers(service: Service, topics: Topics) -> None:
    """Then what is known stays, for it may be right again."""
    client = AIOKafkaClient(bootstrap_servers=service.bootstrap, request_timeout_ms=60_000)
    await client.bootstrap()
    try:
        known = client.cluster.brokers()
        service.refuse()
        assert not await update_metadata(client, client.cluster, [topics.input])
        assert client.cluster.brokers() == known
    finally:
        await client.close()


async def test_a_silent_broker_holds_up_neither_the_others_nor_itself_at_another_address(service: Service) -> None:
    client = AIOKafkaClient(bootstrap_servers=service.bootstrap, request_timeout_ms=60_000)
    await client.bootstrap()
    service.old_address.set(swallows=True)
    silent = [asyncio.create_task(client._get_conn(1)) for _ in range(2)]
    try:
        host, port = service.kafka.bootstrap.split(":")
        await asyncio.sleep(0)
        for node in (2, 1):
            client.cluster._brokers[node] = BrokerMetadata(node, host, int(port), None)
            connection = await within(60, client._get_conn(node))
            assert connection.connected()
        assert not any(task.done() for task in silent)
    finally:
        await cancel_all(silent)
        await client.close()


# A partition without a leader.


def producer_records(topic: str, *numbers: int) -> list[ProducerRecord]:
    return [ProducerRecord(topic, Outgoing(b"key", b"%d" % number, [], None), 0, number) for number in numbers]


async def until(condition: Callable[[], object], what: str) -> None:
    """As wait_for, beside the event loop's other work."""
    await asyncio.to_thread(wait_for, condition, what)


async def test_a_batch_whose_leader_goes_is_written_once(topics: Topics) -> None:
    """The leader may have it before it goes; so the very same batch is sent again, however long that takes."""
    try:
        with two_nodes() as (first, second):
            kafka, metrics = Kafka(first.bootstrap), Metrics("")
            kafka.admin.create_topics([NewTopic(topics.output, 1, replica_assignment=[[2]])])[topics.output].result(30)
            connection = Connection((first.bootstrap,), request_timeout_ms=1_000)
            sink = Sink(connection, limits={}, metrics=metrics, health=Health())
            await sink.start()
            await sink.publish(producer_records(topics.output, 0))
            producer = sink._producer
            assert producer is not None
            second.pause()
            publishing = asyncio.create_task(sink.publish(producer_records(topics.output, 1)))
            tp = TopicPartition(topics.output, 0)
            await until(lambda: producer._metadata.leader_for_partition(tp) == -1, "a partition without a leader")
            await asyncio.wait({publishing}, timeout=2 * connection.request_timeout_s)
            assert not publishing.done()
            second.resume()
            await publishing
            await sink.publish(producer_records(topics.output, 2))
            assert sink._producer is producer
            await sink.close(5)
            assert [record.value for record in kafka.read(topics.output)] == [b"0", b"1", b"2"]
            assert metrics.duplicates_possible._value.get() == 0
    except UnavailableError as reason:
        pytest.skip(f"two brokers need Java: {reason}")


# What a stop leaves behind.


def sockets() -> set[int]:
    """This process's open TCP sockets of Python: not those of librdkafka, which creates topics, nor Docker's client's."""
    made = [each for each in gc.get_objects() if isinstance(each, socket.socket) and each.family != socket.AF_UNIX]
    return {id(each) for each in made if each.fileno() >= 0}


Opened = Callable[[Connection, str], Awaitable[Callable[[], Awaitable[None]]]]


async def opened_producer(connection: Connection, topic: str) -> Callable[[], Awaitable[None]]:
    sink = Sink(connection, limits={}, metrics=Metrics(""), health=Health())
    await sink.publish(producer_records(topic, 0))
    assert sink._producer is not None
    producer = sink._producer

    async def close() -> None:
        batch = producer.create_batch()
        batch.append(timestamp=None, key=None, value=b"on its way")
        await producer.send_batch(batch, topic, partition=0)
        await sink.close(1)

    return close


async def opened_transaction(connection: Connection, topic: str) -> Callable[[], Awaitable[None]]:
    sink = TransactionalSink(connection, transactional_id=topic, limits={}, metrics=Metrics(""), health=Health())
    await sink.open()
    await sink.publish(producer_records(topic, 0))

    async def close() -> None:
        with pytest.raises(TransactionFailed):
            await sink.commit({TopicPartition(topic, 0): (1, "")}, Membership(topic, 1, "member"))
        await sink.close(1)

    return close


async def opened_consumer(connection: Connection, topic: str) -> Callable[[], Awaitable[None]]:
    consumer = Consumer(**connection.options(), group_id=topic, enable_auto_commit=False)
    consumer.subscribe([topic])
    await consumer.start()
    await consumer.getmany(timeout_ms=0)
    tp = TopicPartition(topic, 0)
    await until(lambda: tp in consumer.assignment(), "an assignment")
    await consumer.position(tp)
    return lambda: stop_client(consumer, "consumer", 1)


@pytest.mark.parametrize("opened", [opened_producer, opened_transaction, opened_consumer])
async def test_a_stop_that_is_cut_short_leaves_no_task_and_no_socket(
    fragile_broker: Broker, topics: Topics, opened: Opened
) -> None:
    Kafka(fragile_broker.bootstrap).create(topics.output, 1)
    connection = Connection((fragile_broker.bootstrap,), request_timeout_ms=10_000)
    tasks, open_sockets = asyncio.all_tasks(), sockets()
    close = await opened(connection, topics.output)
    assert sockets() - open_sockets
    fragile_broker.pause()
    await close()
    loop = asyncio.get_running_loop()
    await until(lambda: not asyncio.all_tasks(loop) - tasks, "no task that was not there before")
    await until(lambda: not sockets() - open_sockets, "no socket that was not there before")
