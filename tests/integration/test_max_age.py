"""Records that are older than `max_age_s` when they are read: skipped, counted, committed in order."""

import time

import orjson
import pytest

from tests.support.process import COSTLESS, Workers
from tests.support.scenario import places, wait_until_committed
from tests.support.topics import Kafka, Load, Record, Topics, numbered
from tests.support.waiting import wait_for

pytestmark = pytest.mark.kafka
DELIVERIES = pytest.mark.parametrize("delivery", ["at-least-once", "exactly-once"])
DAY_MS = 86_400_000
TOLD = "are all older than max_age_s"


@pytest.fixture
def worker_module() -> str:
    return COSTLESS


def dated(number: int, time_ms: int) -> Record:
    record = numbered(number)
    return Record(record.value, record.key, (), time_ms)


@DELIVERIES
def test_after_an_outage_what_is_fresh_is_scored_and_the_rest_is_skipped(
    kafka: Kafka, topics: Topics, workers: Workers, delivery: str
) -> None:
    """However many have waited in Kafka: they do not count towards the limit on dead letters."""
    kafka.create_all(topics, 2)
    now = int(time.time() * 1000)
    old = kafka.send(topics.input, [dated(number, now - DAY_MS) for number in range(6_000)])
    bad = [Record(b"no JSON", b"key", timestamp=now - DAY_MS), Record(None, b"tombstone", timestamp=now - DAY_MS)]
    kafka.send(topics.input, bad)
    fresh = kafka.send(topics.input, [dated(number, now) for number in range(300)])
    worker = workers.start(topics, delivery=delivery, max_age_s=3_600, max_batch_texts=200).wait_until_ready()
    wait_until_committed(kafka, topics)
    wait_for(lambda: worker.metrics.outcomes == len(old) + len(bad) + len(fresh), "every record to be counted")
    metrics = worker.metrics
    assert metrics.counts_by("reason", "records_skipped_total") == {"too_old": len(old) + 1}
    assert metrics.get("records_consumed_total") == metrics.outcomes
    assert metrics.get("tombstones_total") == 1
    assert worker.terminate() == 0
    assert len(worker.warnings(TOLD)) == 1
    assert kafka.read(topics.dead_letters) == []
    results = [record for record in kafka.read(topics.output) if record.value]
    assert set(places(results).values()) == {1}
    assert set(places(results)) == {record.place for record in fresh}


@DELIVERIES
def test_a_clock_that_is_wrong_ends_the_worker(kafka: Kafka, topics: Topics, workers: Workers, delivery: str) -> None:
    """It is two hours ahead, so that all that is written now seems too old."""
    kafka.create_all(topics, 2)
    load = Load(kafka, topics.input, 500)
    load.start()
    settings = {"delivery": delivery, "max_age_s": 3_600, "dead_letter_window": 200}
    worker = workers.start(topics, {"CLOCK_S": "7200"}, module="tests.support.wrong_clock", **settings)
    try:
        assert worker.wait(120) == 1
    finally:
        load.stop()
    (sentence,) = worker.warnings("dead_letter_limit = 0.5")
    assert "for too_old" in sentence
    assert "a clock" in sentence
    assert len(worker.warnings(TOLD)) == 1
    assert kafka.read(topics.output) == kafka.read(topics.dead_letters) == []

    right = workers.start(topics, delivery=delivery, max_age_s=3_600)
    wait_until_committed(kafka, topics)
    assert right.terminate() == 0
    assert {orjson.loads(record.value or b"")["label"] for record in kafka.read(topics.output)}


@DELIVERIES
def test_a_transaction_that_was_open_for_longer_ends_nobody(
    kafka: Kafka, topics: Topics, workers: Workers, delivery: str
) -> None:
    """Its records were fresh when they were written, and are too old once they can be read."""
    kafka.create_all(topics, 1)
    worker = workers.start(topics, delivery=delivery, max_age_s=2, dead_letter_window=100).wait_until_assigned(1)
    producer = kafka.begin_transaction(topics.group)
    for number in range(300):
        producer.produce(topics.input, numbered(number).value)
    producer.flush()
    time.sleep(4)
    producer.commit_transaction()
    wait_for(lambda: not worker.is_running or worker.metrics.outcomes == 300, "every record to be counted")
    assert worker.is_running, worker.output[-2000:]
    assert worker.metrics.counts_by("reason", "records_skipped_total") == {"too_old": 300}
    assert worker.terminate() == 0
