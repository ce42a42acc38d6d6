"""What is not there yet is waited for: said once, and nothing is created by accident."""

import asyncio
import json
import socket
import urllib.request

import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka.coordinator.assignors.range import RangePartitionAssignor

from tests.support.process import COSTLESS, Workers
from tests.support.topics import Kafka, Topics, numbered
from tests.support.waiting import holds_for, wait_for

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


def test_missing_topics_are_told_while_the_model_is_loading(kafka: Kafka, topics: Topics, workers: Workers) -> None:
    for name in (topics.input, topics.dead_letters):
        kafka.create(name)
    kafka.send(topics.input, map(numbered, range(10)))
    worker = workers.start(topics, {"PASS_SECONDS": "600"})  # of which there are some before the model is loaded
    wait_for(lambda: worker.warnings(topics.output), "a line about the output topic")
    kafka.create(topics.output)
    wait_for(lambda: worker.lines("topics: recovered after"), "the topics")
    assert worker.get("/readyz") == (503, "model: loading\n")
    assert not worker.lines("model loaded")
    assert not kafka.committed(topics.group, topics.input)
    assert worker.terminate() == 0


def test_what_is_in_force_is_told_when_it_is_ready(kafka: Kafka, topics: Topics, workers: Workers) -> None:
    for name in (topics.input, topics.output, topics.dead_letters):
        kafka.create(name, 2)
    worker = workers.start(topics).wait_until_assigned(2)
    in_force = {
        "device": "cpu", "dtype": "float32", "backend": "torch", "cpu_threads": "1", "max_batch_tokens": "1000000",
        "max_batch_texts": "512",
    }  # fmt: skip
    (line,) = [line for line in worker.logs if line["message"] == "ready"]
    said = {"model": "costless@0", **in_force, "max_batch_texts": 512, "partitions": 2}
    assert {name: line.get(name) for name in said} == said
    labels = {"model": "costless", "revision": "0", **in_force}
    assert worker.metrics.get("model_info", **labels) == 1
    with urllib.request.urlopen(worker.url + "/events", timeout=60) as stream:
        shown = next(line for line in stream if line.startswith(b"data: "))
    assert json.loads(shown.removeprefix(b"data: "))["model"] == labels
    assert worker.terminate() == 0
    assert (worker.logs[-1]["message"], worker.logs[-1]["exit_code"]) == ("drained", 0)


async def test_a_group_whose_members_share_out_otherwise_is_named(
    kafka: Kafka, topics: Topics, workers: Workers
) -> None:
    """Another application has this group_id. It is waited for, for it may go."""
    for name in (topics.input, topics.output, topics.dead_letters):
        kafka.create(name)
    other = AIOKafkaConsumer(
        topics.input,
        bootstrap_servers=kafka.bootstrap,
        group_id=topics.group,
        partition_assignment_strategy=[RangePartitionAssignor],
    )
    await other.start()
    try:
        async with asyncio.timeout(60):
            while not other.assignment():  # noqa: ASYNC110 - aiokafka has no event for it
                await asyncio.sleep(0.02)
        worker = workers.start(topics)
        what = f"group {topics.group} has members that share out partitions in another way"
        await asyncio.to_thread(wait_for, lambda: worker.warnings(what), "a line about the group")
        assert what in worker.get("/readyz")[1]
        assert not worker.warnings("Error 23")
    finally:
        await other.stop()
    await asyncio.to_thread(worker.wait_until_ready)
    assert worker.terminate() == 0
