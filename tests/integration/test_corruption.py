"""A record that cannot be read ends the worker with its address, and takes nothing else with it."""

from collections.abc import Callable

import pytest

from tests.support.broker import Broker
from tests.support.process import COSTLESS, Workers
from tests.support.scenario import result_place, wait_until_committed
from tests.support.topics import Kafka, Record, Topics, numbered

pytestmark = pytest.mark.kafka


@pytest.fixture
def worker_module() -> str:
    return COSTLESS


BAD = 50  # its offset, in partition 0


async def send_around(kafka: Kafka, topic: str, bad: Record) -> None:
    """50 good records, the bad one and 50 good ones into partition 0; 300 good ones into partitions 1 and 2."""
    kafka.create(topic, 3)
    kafka.send(topic, [in_partition(0, number) for number in range(50)])
    await kafka.send_as_it_is(topic, 0, bad)
    kafka.send(topic, [in_partition(0, number) for number in range(50)])
    kafka.send(topic, [in_partition(1 + number % 2, number) for number in range(300)])


def in_partition(partition: int, number: int) -> Record:
    record = numbered(number)
    return Record(record.value, record.key, partition=partition)


def assert_it_ends_with_the_address(kafka: Kafka, topics: Topics, workers: Workers) -> None:
    worker = workers.start(topics)
    assert worker.wait(90) == 1
    last_words = worker.logs[-1]
    assert last_words["level"] in ("ERROR", "CRITICAL")
    for part in (topics.input, "0", str(BAD)):
        assert part in str(last_words), f"the last line names topic, partition and offset: {last_words}"
    committed = kafka.committed(topics.group, topics.input)
    assert committed.get(0, 0) <= BAD, "nothing is skipped"
    done = {result_place(record) for record in kafka.read(topics.output)}
    promised = {(topics.input, partition, offset) for partition, end in committed.items() for offset in range(end)}
    assert promised <= done, "what is committed is published"


def assert_the_rest_is_there(kafka: Kafka, topics: Topics, workers: Workers) -> None:
    """With the group moved past the bad record by hand, every other record has its result."""
    kafka.seek(topics.group, topics.input, 0, BAD + 1)
    worker = workers.start(topics)
    wait_until_committed(kafka, topics)
    assert worker.terminate() == 0
    ends = kafka.ends(topics.input)
    everything = {(topics.input, partition, offset) for partition, end in ends.items() for offset in range(end)}
    done = {result_place(record) for record in kafka.read(topics.output)}
    assert everything - done <= {(topics.input, 0, offset) for offset in range(BAD + 1)}
    assert len(everything - done) <= BAD + 1


async def test_a_header_that_is_no_utf8_ends_the_worker_with_its_place(
    kafka: Kafka, topics: Topics, workers: Workers
) -> None:
    await send_around(kafka, topics.input, Record(b'{"text": "bad"}', b"key", [("\udcff\udcfe", b"value")], 1))
    kafka.create(topics.output)
    kafka.create(topics.dead_letters)
    assert_it_ends_with_the_address(kafka, topics, workers)
    assert_the_rest_is_there(kafka, topics, workers)


async def test_a_bad_checksum_ends_the_worker_with_its_place(
    fragile_broker: Broker, topics: Topics, fragile_workers: Workers
) -> None:
    kafka = Kafka(fragile_broker.bootstrap)
    await send_around(kafka, topics.input, Record(b'{"text": "wholesome"}', b"key", (), 1))
    kafka.create(topics.output)
    kafka.create(topics.dead_letters)
    rewrite(fragile_broker, topics.input, lambda log: log.replace(b"wholesome", b"wholetome"))
    assert_it_ends_with_the_address(kafka, topics, fragile_workers)


def rewrite(broker: Broker, topic: str, change: Callable[[bytes], bytes]) -> None:
    """Changes what lies on the broker's disk; a clean start does not look."""
    broker.stop()
    log = broker.read_segment(topic, 0)
    assert change(log) != log
    broker.write_segment(topic, 0, change(log))
    broker.start()
