"""A topic that is deleted and created again under its name is another topic: no offset of the old one holds for it."""

import orjson
import pytest

from tests.support.process import COSTLESS, WorkerProcess, Workers
from tests.support.topics import Kafka, Record, Topics
from tests.support.waiting import wait_for

pytestmark = pytest.mark.kafka
DELIVERIES = pytest.mark.parametrize("delivery", ["at-least-once", "exactly-once"])
OLD, NEW = 8_000, 8_000


@pytest.fixture
def worker_module() -> str:
    return COSTLESS


def events(age: str, count: int) -> list[Record]:
    return [Record(orjson.dumps({"id": f"{age} {number}", "text": f"{age} {number}"})) for number in range(count)]


def busy(kafka: Kafka, topics: Topics, workers: Workers, delivery: str) -> WorkerProcess:
    """A worker with a backlog of old events, which has committed some."""
    kafka.create_all(topics, 1)
    kafka.send(topics.input, events("old", OLD))
    slow = {"PASS_SECONDS": "0.5"}  # with these micro-batches the backlog lasts for two minutes
    worker = workers.start(topics, slow, delivery=delivery, max_batch_texts=32)
    worker.wait_until_assigned(1)
    wait_for(lambda: kafka.committed(topics.group, topics.input), "a first commit")
    return worker


def make_anew(kafka: Kafka, topics: Topics) -> None:
    """With so many new events that every old offset is an offset of the new topic, too."""
    kafka.delete(topics.input)
    kafka.create(topics.input)
    kafka.send(topics.input, events("new", NEW))


def assert_the_next_worker_scores_every_new_event(
    kafka: Kafka, topics: Topics, workers: Workers, delivery: str
) -> None:
    assert 0 < kafka.committed(topics.group, topics.input)[0] < NEW, "nothing was committed late: this shows nothing"
    worker = workers.start(topics, delivery=delivery).wait_until_assigned(1)
    wait_for(lambda: kafka.committed(topics.group, topics.input)[0] >= NEW, "every new event to be committed")
    resets = worker.metrics.get("offset_resets_total")
    assert worker.terminate() == 0
    ids = {orjson.loads(record.value or b"")["id"] for record in kafka.read(topics.output)}
    assert {id for id in ids if id.startswith("new")} == {f"new {number}" for number in range(NEW)}
    assert resets == 1
    assert len(worker.warnings("deleted and created again since this offset was committed")) == 1


@DELIVERIES
def test_made_anew_while_the_worker_stops(kafka: Kafka, topics: Topics, workers: Workers, delivery: str) -> None:
    """Its last commit is of the old topic, and comes when the brokers have forgotten those before."""
    worker = busy(kafka, topics, workers, delivery)
    worker.pause()
    make_anew(kafka, topics)
    worker.resume()
    worker.terminate()
    assert_the_next_worker_scores_every_new_event(kafka, topics, workers, delivery)


@DELIVERIES
def test_made_anew_while_the_worker_is_busy(kafka: Kafka, topics: Topics, workers: Workers, delivery: str) -> None:
    worker = busy(kafka, topics, workers, delivery)
    make_anew(kafka, topics)
    assert worker.wait() == 1
    assert len(worker.warnings(f"the input topic {topics.input} was deleted and created again")) == 1
    assert not worker.lines("nobody foresaw")
    assert_the_next_worker_scores_every_new_event(kafka, topics, workers, delivery)
