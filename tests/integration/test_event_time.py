"""Events older than the output keeps its records, timestamps that cannot be right, and texts that are null."""

import asyncio
import time
from collections.abc import Callable

import orjson
import pytest

from tests.integration.test_check import flags
from tests.integration.test_clocks import PATIENT
from tests.support.process import COSTLESS, Workers
from tests.support.scenario import wait_until_committed
from tests.support.topics import Kafka, Record, Topics
from tests.support.waiting import wait_for
from worker.commands.check_kafka import kafka_findings
from worker.commands.finding import Finding
from worker.commands.kafka_connection import kafka_connection
from worker.settings.run import RunSettings
from worker.settings.sources import load

pytestmark = pytest.mark.kafka
DAY_MS = 86_400_000
DELIVERIES = pytest.mark.parametrize("delivery", ["at-least-once", "exactly-once"])


@pytest.fixture
def worker_module() -> str:
    return COSTLESS


def send_old(kafka: Kafka, topics: Topics) -> int:
    """Events of a month ago, for an output that keeps a week. Answers with their timestamp."""
    kafka.create(topics.input, 1)
    kafka.create(topics.output, 1, retention_ms=7 * DAY_MS)
    kafka.create(topics.dead_letters, 1)
    old = int(time.time() * 1000) - 30 * DAY_MS
    new = [Record(b'{"id": "new", "text": "x"}', b"key")]
    kafka.send(topics.input, [Record(b'{"id": "%d", "text": "x"}' % n, timestamp=old) for n in range(1_000)] + new)
    return old


def test_check_warns_of_results_that_would_be_older_than_their_topic_keeps_them(kafka: Kafka, topics: Topics) -> None:
    def retention(*more: str) -> list[Finding]:
        async def findings() -> list[Finding]:
            return [
                finding
                async for finding in kafka_findings(settings, kafka_connection(settings))
                if finding.subject == "retention"
            ]

        settings = load(RunSettings, [*map(str, flags(kafka, topics)), *more], "check", {})
        return asyncio.run(findings())

    send_old(kafka, topics)
    [(_, verdict, said, _)] = retention()
    assert verdict == "warn"
    assert f"up to 1,000 unread records may be older than {topics.output} keeps its own (168 h)" in said
    assert retention("--result-timestamp", "now") == retention("--auto-offset-reset", "latest") == []
    kafka.seek(topics.group, topics.input, 0, 990)
    assert "up to 10 unread records" in retention()[0].sentence
    kafka.seek(topics.group, topics.input, 0, 1_000)
    assert retention() == []
    kafka.set_config(topics.output, "retention.ms", -1)
    kafka.seek(topics.group, topics.input, 0, 0)
    assert retention() == []


@DELIVERIES
def test_results_older_than_their_topic_keeps_them_are_told_once(
    kafka: Kafka, topics: Topics, workers: Workers, delivery: str
) -> None:
    old = send_old(kafka, topics)
    kafka.send(topics.output, [Record(b"{}", b"key")])  # new: brokers keep the segment, whenever they look for old ones
    worker = workers.start(topics, max_batch_texts=100, delivery=delivery)
    wait_until_committed(kafka, topics)
    assert worker.terminate() == 0
    assert len(worker.warnings("older than its topic keeps records")) == 1
    assert [record.timestamp for record in kafka.read(topics.output)][1:-1] == [old] * 1_000


@DELIVERIES
def test_results_may_have_the_time_of_their_publishing(
    kafka: Kafka, topics: Topics, workers: Workers, delivery: str
) -> None:
    old = send_old(kafka, topics)
    kafka.send(topics.input, [Record(None, b"tombstone", timestamp=old)])
    began_at = int(time.time() * 1000)
    worker = workers.start(topics, result_timestamp="now", delivery=delivery)
    wait_until_committed(kafka, topics)
    assert worker.terminate() == 0
    assert not worker.warnings("older")
    published = kafka.read(topics.output)
    assert all(began_at <= record.timestamp <= time.time() * 1000 for record in published)
    results = [orjson.loads(record.value) for record in published if record.value]
    of_old = [result["event_time"] for result in results if result["id"] != "new"]
    assert len(of_old) == 1_000
    assert len(published) == 1_002
    assert set(of_old) == {time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(old // 1000)) + f".{old % 1000:03d}Z"}


@DELIVERIES
def test_a_timestamp_in_seconds_spoils_no_metric(kafka: Kafka, topics: Topics, workers: Workers, delivery: str) -> None:
    kafka.create_all(topics, 1)
    stamps: list[Callable[[], int]] = [lambda: int(time.time()), lambda: int(time.time() * 1000) + 1_800_000]
    for stamp in (*stamps, lambda: int(time.time() * 1000)):
        kafka.send(topics.input, [Record(b'{"text": "%d"}' % n, timestamp=stamp()) for n in range(10)])
    worker = workers.start(topics, delivery=delivery).wait_until_ready()
    wait_until_committed(kafka, topics)
    wait_for(lambda: worker.metrics.outcomes == 30, "every record to be counted")
    metrics = worker.metrics
    assert metrics.get("results_published_total") == 30
    assert metrics.get("implausible_timestamps_total") == 20
    assert metrics.get("end_to_end_seconds_count") == 10
    assert metrics.get("end_to_end_seconds_sum") < 10 * 200


def deletes(count: int) -> list[Record]:
    """Change events as Debezium writes them; of ten, nine are deletions."""
    values = [{"before": {"id": n}, "after": {"text": "x"} if n % 10 == 0 else None, "id": n} for n in range(count)]
    return [Record(orjson.dumps(value), b"key %d" % (n % 7)) for n, value in enumerate(values)]


@DELIVERIES
def test_null_texts_are_skipped_where_that_is_set_and_do_not_count_towards_the_limit(
    kafka: Kafka, topics: Topics, workers: Workers, delivery: str
) -> None:
    kafka.create_all(topics, 2)
    kafka.send(topics.input, deletes(1_000))
    limits = {"text_field": "after.text", "dead_letter_window": 100, "max_batch_texts": 50, "delivery": delivery}
    limited = workers.start(topics, PATIENT, **limits)
    assert limited.wait(150) == 1
    assert limited.lines("for missing_text", "dead_letter_limit")
    results, letters = len(kafka.read(topics.output)), len(kafka.read(topics.dead_letters))
    worker = workers.start(topics, on_null_text="skip", **limits).wait_until_ready()
    wait_until_committed(kafka, topics)
    wait_for(lambda: worker.metrics.outcomes == 1_000 - letters - results, "every record to be counted")
    metrics = worker.metrics
    assert worker.terminate() == 0
    assert len(kafka.read(topics.dead_letters)) == letters
    assert len(kafka.read(topics.output)) == 100
    assert metrics.get("results_published_total") == 100 - results
    assert metrics.get("records_skipped_total") == metrics.get("records_consumed_total") - 100 + results
