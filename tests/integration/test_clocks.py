"""Whose clock is wrong, this machine's or a producer's: the broker decides, and what it refuses is told and bounded."""

import time

import pytest

from tests.support.process import COSTLESS, WorkerProcess, Workers
from tests.support.scenario import letter_place, result_place, wait_until_committed
from tests.support.topics import Kafka, Record, Topics, numbered
from tests.support.waiting import wait_for

pytestmark = pytest.mark.kafka
BOTH = pytest.mark.parametrize("delivery", ["at-least-once", "exactly-once"])
HOUR_MS = 3_600_000
PATIENT = {"INTERVALS": '{"AFTER_ERROR_S": 60}'}  # what is published is committed, however busy the machine is


@pytest.fixture
def worker_module() -> str:
    return COSTLESS


def stamped(number: int, timestamp: int) -> Record:
    record = numbered(number)
    return Record(record.value, record.key, (), timestamp)


def publishing_errors(worker: WorkerProcess) -> float:
    metrics = worker.metrics
    return sum(metrics.get("kafka_errors_total", operation=operation) for operation in ("publish", "transaction"))


def now_ms() -> int:
    return int(time.time() * 1000)


@BOTH
@pytest.mark.parametrize(
    ("clock_s", "limits"),
    [
        (-7_200, {}),
        (7_200, {"message_timestamp_before_max_ms": HOUR_MS, "message_timestamp_after_max_ms": 3 * HOUR_MS}),
    ],
    ids=["slow", "fast"],
)
def test_this_machines_clock_costs_no_record(
    kafka: Kafka, topics: Topics, workers: Workers, delivery: str, clock_s: int, limits: dict[str, int]
) -> None:
    kafka.create(topics.input, 2)
    kafka.create(topics.output, 2, **limits)
    kafka.create(topics.dead_letters)
    sent = kafka.send(topics.input, map(numbered, range(3_000)))
    worker = workers.start(
        topics, {"CLOCK_S": str(clock_s)}, module="tests.support.wrong_clock", delivery=delivery, max_batch_texts=200
    )
    wait_until_committed(kafka, topics)
    wait_for(lambda: worker.metrics.outcomes == len(sent), "every record to be counted")
    assert worker.metrics.get("results_published_total") == len(sent)
    assert publishing_errors(worker) == 0, "no refusal, no producer lost"
    assert worker.terminate() == 0
    results = [place for record in kafka.read(topics.output) if (place := result_place(record))]
    assert sorted(results) == sorted(record.place for record in sent)


@BOTH
def test_a_producers_clock_costs_a_refusal_a_minute_and_is_told_once(
    kafka: Kafka, topics: Topics, workers: Workers, delivery: str
) -> None:
    """Half of the records are ten hours ahead. No producer of ours is lost for each, and the others come out in order."""
    kafka.create(topics.input, 1, message_timestamp_after_max_ms=2**62)
    kafka.create(topics.output, 2)
    kafka.create(topics.dead_letters)
    now = now_ms()
    records = [stamped(number, now + (number % 2) * 10 * HOUR_MS) for number in range(2_000)]
    sent = kafka.send(topics.input, records)
    a_minute = {"INTERVALS": '{"REFUSAL_VALID_S": 600}'}  # however long the machine takes for the records
    worker = workers.start(topics, a_minute, delivery=delivery, max_batch_texts=200, dead_letter_limit=0)
    wait_until_committed(kafka, topics)
    wait_for(lambda: worker.metrics.outcomes == len(sent), "every record to be counted")
    assert worker.metrics.counts_by("reason", "dead_letters_total") == {"invalid_timestamp": 1_000}
    assert publishing_errors(worker) <= 2, "one for each partition of the output"
    assert len(worker.warnings("results are refused")) == 1
    assert worker.terminate() == 0
    letters = sorted(map(letter_place, kafka.read(topics.dead_letters)))
    assert letters == [record.place for record in sent[1::2]]
    for partition in (0, 1):
        offsets = [
            place[2]
            for record in kafka.read(topics.output)
            if record.partition == partition and (place := result_place(record))
        ]
        assert offsets == sorted(set(offsets))
    assert kafka.count(topics.output) >= 1_000


@BOTH
def test_what_the_output_refuses_counts_towards_the_limit_too(
    kafka: Kafka, topics: Topics, workers: Workers, delivery: str
) -> None:
    kafka.create(topics.input, 1, message_timestamp_after_max_ms=2**62)
    kafka.create(topics.output)
    kafka.create(topics.dead_letters)
    now = now_ms()
    sent = kafka.send(topics.input, [stamped(number, now + 10 * HOUR_MS) for number in range(6_000)])
    settings = {"delivery": delivery, "max_batch_texts": 100, "dead_letter_window": 500, "cache_size": 0}
    worker = workers.start(topics, {"PASS_SECONDS": "0.05", **PATIENT}, **settings)
    assert worker.wait(150) == 1
    (sentence,) = worker.warnings("dead_letter_limit = 0.5")
    assert "for invalid_timestamp" in sentence
    done = len(kafka.read(topics.dead_letters))
    assert done < len(sent)
    wait_for(lambda: sum(kafka.committed(topics.group, topics.input).values()) == done, "their offsets")
