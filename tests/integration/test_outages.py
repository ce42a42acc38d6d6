"""A broker that is not there, goes away and comes back. It is a broker of its own: the others' tests go on."""

import asyncio
import contextlib

import pytest
from aiokafka import TopicPartition

from tests.support.broker import Broker
from tests.support.process import COSTLESS, Workers
from tests.support.scenario import result_place, wait_until_committed
from tests.support.topics import Kafka, Load, Topics, numbered
from tests.support.waiting import holds_for, wait_for
from worker.kafka.connection import UNREACHABLE
from worker.kafka.consumer import Consumer
from worker.runtime.tasks import within

pytestmark = pytest.mark.kafka


@pytest.fixture
def worker_module() -> str:
    return COSTLESS


@pytest.fixture
def fragile_kafka(fragile_broker: Broker) -> Kafka:
    return Kafka(fragile_broker.bootstrap)


def test_kafka_is_not_there_at_the_start(
    fragile_broker: Broker, fragile_kafka: Kafka, topics: Topics, fragile_workers: Workers
) -> None:
    fragile_kafka.create_all(topics)
    fragile_kafka.send(topics.input, map(numbered, range(10)))
    fragile_broker.stop()
    worker = fragile_workers.start(topics).wait_for_status("/livez", 200)
    wait_for(lambda: worker.warnings(fragile_broker.bootstrap), "a line that says what it waits for")
    holds_for(lambda: worker.status("/livez") == 200 and worker.status("/readyz") == 503, "live, not ready", 8)
    assert len(worker.warnings()) == 1, f"said once, not at every try: {worker.warnings()}"

    fragile_broker.start()
    worker.wait_until_ready()
    wait_for(lambda: fragile_kafka.count(topics.output) == 10, "the results")
    assert worker.terminate() == 0


@pytest.mark.parametrize("outage", [("stop", 20), ("kill", 5)], ids=["stop", "kill"])
def test_a_broker_that_goes_away_under_load_loses_and_repeats_nothing(
    fragile_broker: Broker,
    fragile_kafka: Kafka,
    topics: Topics,
    fragile_workers: Workers,
    outage: tuple[str, float],
) -> None:
    """The same process lives through it and goes on by itself; nothing is missing."""
    end, seconds = outage
    fragile_kafka.create_all(topics, 4)
    worker = fragile_workers.start(topics).wait_until_ready()
    load = Load(fragile_kafka, topics.input, 500)
    load.start()
    try:
        wait_for(lambda: fragile_kafka.count(topics.output) >= 1_000, "1,000 results")
        getattr(fragile_broker, end)()
        holds_for(lambda: worker.is_running and worker.status("/livez") == 200, "the worker is alive", seconds)
        wait_for(lambda: worker.status("/readyz") == 503, "it to say that Kafka is away", 30)
        fragile_broker.start()
        worker.wait_until_ready()
        before = fragile_kafka.count(topics.output)
        wait_for(
            lambda: fragile_kafka.count(topics.output) >= before + 1_000,
            "new results",
            describe=lambda: (load.offered, fragile_kafka.count(topics.input), before, worker.metrics.outcomes),
        )
    finally:
        load.end()
    sent = load.stop()
    wait_until_committed(fragile_kafka, topics, 120)
    missing = {record.place for record in sent} - {result_place(record) for record in fragile_kafka.read(topics.output)}
    assert not missing, f"{len(missing)} of {len(sent)} are missing, such as {sorted(missing)[:3]}"
    assert len(worker.warnings()) < 10, f"not a line at every try: {worker.warnings()}"
    assert worker.terminate() == 0


def restart(broker: Broker) -> None:
    broker.stop()
    broker.start()


async def test_a_coordinator_that_is_loading_or_leaving_does_not_say_that_nothing_is_committed(
    fragile_broker: Broker, fragile_kafka: Kafka, topics: Topics
) -> None:
    """Who believes it begins at the topic's first record again, or at its end."""
    fragile_kafka.create_all(topics, 1)
    tp = TopicPartition(topics.input, 0)
    consumer = Consumer(bootstrap_servers=fragile_kafka.bootstrap, group_id=topics.group, enable_auto_commit=False)
    await consumer.start()
    answers: list[int] = []
    try:
        consumer.assign([tp])
        await consumer.commit({tp: 7})
        for _ in range(3):
            restarting = asyncio.create_task(asyncio.to_thread(restart, fragile_broker))
            answered = len(answers)
            while not restarting.done() or len(answers) == answered:
                with contextlib.suppress(*UNREACHABLE):
                    answers.append((await within(60, consumer.committed_offsets([tp])))[tp].offset)
            await restarting
    finally:
        await consumer.stop()
    assert set(answers) == {7}
