"""Three brokers, replication 3, and one that leads is killed under load."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka.admin import NewTopic

from tests.chaos.cluster import Node, cluster
from tests.chaos.conftest import BeginFeed
from tests.chaos.driver import MODEL, audited, wait_for_results
from tests.support.broker import UnavailableError
from tests.support.process import workers_in
from tests.support.scenario import wait_until_committed
from tests.support.topics import Kafka, Topics

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def three_nodes() -> Iterator[dict[int, Node]]:
    try:
        with cluster() as nodes:
            yield nodes
    except UnavailableError as reason:
        pytest.skip(f"three brokers need Java: {reason}")


@pytest.fixture
def nodes(three_nodes: dict[int, Node]) -> Iterator[dict[int, Node]]:
    """All of them run again before the next test."""
    yield three_nodes
    for node in three_nodes.values():
        node.restore()


@pytest.mark.parametrize("delivery", ["at-least-once", "exactly-once"])
def test_a_leader_is_killed_under_load(
    nodes: dict[int, Node], topics: Topics, begin_feed: BeginFeed, tmp_path: Path, delivery: str
) -> None:
    everyone = ",".join(node.bootstrap for node in nodes.values())
    kafka = Kafka(everyone)
    names = (topics.input, topics.output, topics.dead_letters)
    for made in kafka.admin.create_topics([NewTopic(name, 6, 3) for name in names]).values():
        made.result(60)
    with workers_in(everyone, Path("builtin"), tmp_path) as workers:
        fleet = [workers.start(topics, module=MODEL, delivery=delivery).wait_until_ready() for _ in range(2)]
        feed = begin_feed(
            kafka, topics, 1_000_000, 400
        )  # until it is stopped: a node takes long to start on a busy machine
        for _ in range(2):
            wait_for_results(kafka, topics, 2_000)
            leader = nodes[leader_of(kafka, topics.output)]
            leader.kill()
            wait_for_results(kafka, topics, 1_000)
            assert leader_of(kafka, topics.output) != leader.number, "the results came without that broker"
            leader.start()
        feed.stop()
        events = feed.finish()
        wait_until_committed(kafka, topics, 300)
        assert all(worker.is_running for worker in fleet), "no worker ended over it"
        assert [worker.terminate() for worker in fleet] == [0, 0]
    found = audited(kafka, topics)
    assert found.failures(delivery) == []
    assert found.events == events


def leader_of(kafka: Kafka, topic: str) -> int:
    """The node that leads the topic's first partition."""
    leader: int = kafka.admin.list_topics(topic, timeout=30).topics[topic].partitions[0].leader
    return leader
