"""An output topic that is deleted, or created again with fewer partitions: named, and carried on with."""

import time

import pytest

from tests.support.process import COSTLESS, LONG_SESSION, Workers
from tests.support.scenario import result_place, wait_until_committed
from tests.support.topics import Kafka, Record, Topics, numbered
from tests.support.waiting import holds_for, wait_for

pytestmark = pytest.mark.kafka
BOTH = pytest.mark.parametrize("delivery", ["at-least-once", "exactly-once"])


@pytest.fixture
def worker_module() -> str:
    return COSTLESS


def send_more(kafka: Kafka, topics: Topics, numbers: range) -> list[Record]:
    sent = kafka.send(topics.input, map(numbered, numbers))
    wait_until_committed(kafka, topics)
    return sent


def assert_each_once(kafka: Kafka, topics: Topics, sent: list[Record]) -> None:
    results = [place for record in kafka.read(topics.output) if (place := result_place(record))]
    assert sorted(results) == sorted(record.place for record in sent)


@BOTH
def test_an_output_that_is_deleted_is_named_and_filled_once_it_is_there_again(
    kafka: Kafka, topics: Topics, workers: Workers, delivery: str
) -> None:
    kafka.create_all(topics, 4)
    worker = workers.start(topics, delivery=delivery, log_level="debug", **LONG_SESSION).wait_until_assigned(4)
    send_more(kafka, topics, range(1_000))
    kafka.delete(topics.output)
    sent = kafka.send(topics.input, map(numbered, range(1_000, 2_000)))
    sentence = f"output_topic: topic {topics.output} does not exist; create it, or name another; waiting for it"
    wait_for(lambda: sentence in worker.get("/readyz")[1], "/readyz to name the topic")
    assert len(worker.warnings(sentence)) == 1, "said once"
    lines_before, began = len(worker.output.splitlines()), time.monotonic()
    holds_for(lambda: worker.status("/readyz") == 503 and worker.status("/livez") == 200, "it waits", 3)
    lines_a_second = (len(worker.output.splitlines()) - lines_before) / (time.monotonic() - began)
    assert lines_a_second < 25, "no line for each retry of each partition; it asks for the topic ten times a second"

    kafka.create(topics.output, 2)
    wait_until_committed(kafka, topics)
    worker.wait_until_ready()
    assert worker.terminate() == 0
    assert_each_once(kafka, topics, sent)


@BOTH
def test_an_output_made_anew_with_fewer_partitions_is_carried_on_with(
    kafka: Kafka, topics: Topics, workers: Workers, delivery: str
) -> None:
    """Between two records: the worker's client still knows the partitions that there were."""
    kafka.create_all(topics, 4)
    worker = workers.start(topics, delivery=delivery, **LONG_SESSION).wait_until_assigned(4)
    send_more(kafka, topics, range(1_000))
    kafka.delete(topics.output)
    kafka.create(topics.output, 2)
    sent = send_more(kafka, topics, range(1_000, 2_000))
    assert worker.terminate() == 0
    assert_each_once(kafka, topics, sent)


@BOTH
@pytest.mark.parametrize(
    ("role", "records", "code", "drain_s", "seconds"),
    [("dead_letter_topic", 0, 0, 120, 60), ("output_topic", 100, 1, 6, 60)],
    ids=["idle", "in flight"],
)
def test_a_drain_without_a_topic_takes_no_longer_than_it_may(
    kafka: Kafka,
    topics: Topics,
    workers: Workers,
    delivery: str,
    role: str,
    records: int,
    code: int,
    drain_s: int,
    seconds: float,
) -> None:
    """Where nothing is on its way, far less than that."""
    kafka.create_all(topics, 2)
    worker = workers.start(topics, delivery=delivery, drain_timeout_s=drain_s).wait_until_assigned(2)
    send_more(kafka, topics, range(100))
    name = topics.output if role == "output_topic" else topics.dead_letters
    kafka.delete(name)
    kafka.send(topics.input, map(numbered, range(records)))
    sentence = f"{role}: topic {name} does not exist"
    wait_for(lambda: sentence in worker.get("/readyz")[1], "/readyz to name the topic")
    assert worker.terminate(seconds) == code
