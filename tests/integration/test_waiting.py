"""What is not there yet is waited for: said once, and nothing is created by accident."""

import socket

import pytest

from tests.process import COSTLESS, Workers
from tests.topics import Kafka, Topics, numbered
from tests.waiting import holds_for, wait_for

pytestmark = pytest.mark.kafka


@pytest.fixture
def worker_module() -> str:
    return COSTLESS


def test_missing_topics_are_waited_for(kafka: Kafka, topics: Topics, workers: Workers) -> None:
    names = {topics.input, topics.output, topics.dead_letters}
    worker = workers.start(topics).wait_for_status("/livez", 200)
    for name in names:
        wait_for(lambda name=name: worker.warnings(name), f"a line about {name}")
    holds_for(lambda: not kafka.names() & names, "no topic is created", 6)
    for name in names:
        assert len(worker.warnings(name)) == 1, "said once"

    for name in (topics.input, topics.output, topics.dead_letters):
        assert (worker.status("/livez"), worker.status("/readyz")) == (200, 503)
        kafka.create(name)
    kafka.send(topics.input, map(numbered, range(10)))
    worker.wait_until_ready()
    wait_for(lambda: kafka.count(topics.output) == 10, "the results")
    assert worker.terminate() == 0


def test_nothing_is_consumed_while_a_topic_is_missing(kafka: Kafka, topics: Topics, workers: Workers) -> None:
    """Without a place for dead letters, not even what has another place to go to is touched."""
    name, others = topics.dead_letters, (topics.input, topics.output)
    for other in others:
        kafka.create(other)
    kafka.send(topics.input, map(numbered, range(10)))
    worker = workers.start(topics)
    wait_for(lambda: worker.warnings(name), f"a line about {name}")
    assert all(not worker.warnings(other) for other in others)
    assert not kafka.committed(topics.group, topics.input)
    assert worker.terminate() == 0, "a worker that waits ends when told to"
    assert name not in kafka.names()


def test_a_worker_is_not_ready_before_it_has_heard_from_the_brokers(topics: Topics, workers: Workers) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        where = f"127.0.0.1:{silent.getsockname()[1]}"
        worker = workers.start(topics, bootstrap_servers=where, request_timeout_ms=3_000)
        wait_for(lambda: worker.lines("model loaded"), "the model")
        seen: set[tuple[int, str]] = set()
        wait_for(
            lambda: seen.add(worker.get("/readyz")) or worker.warnings("waiting for Kafka"), "a line about the brokers"
        )
    assert {status for status, _ in seen} == {503}
    wait_for(lambda: "waiting for Kafka" in worker.get("/readyz")[1], "the reason")
