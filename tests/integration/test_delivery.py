"""Nothing is lost, whatever happens to the workers, and nothing comes twice where nothing broke."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.process import COSTLESS, Workers
from tests.support.scenario import places, result_place, wait_until_committed
from tests.support.topics import Kafka, Load, Record, Topics, numbered, repeated
from tests.support.waiting import holds_for, wait_for

pytestmark = pytest.mark.kafka


@pytest.fixture
def worker_module() -> str:
    return COSTLESS


@pytest.fixture
def load(kafka: Kafka, topics: Topics) -> Iterator[Load]:
    """1,000 events a second into a topic of four partitions, from `start` on."""
    kafka.create_all(topics, 4)
    load = Load(kafka, topics.input, 1000)
    yield load
    load.end()


def assert_none_missing(kafka: Kafka, topics: Topics, sent: list[Record]) -> list[Record]:
    """Every record sent has its result; returns the results."""
    results = kafka.read(topics.output)
    missing = {record.place for record in sent} - {result_place(record) for record in results}
    assert not missing, f"{len(missing)} of {len(sent)} are missing, such as {sorted(missing)[:3]}"
    return results


def test_a_killed_worker_loses_nothing(kafka: Kafka, topics: Topics, workers: Workers, checkpoint: Path) -> None:
    kafka.create_all(topics, 4)
    sent = kafka.send(topics.input, map(numbered, range(20_000)))
    settings = {"module": "tests.support.slow_model", "max_batch_texts": 64, "cache_size": 0, "model": checkpoint}
    first = workers.start(topics, {"TOKEN_SECONDS": "0.0002"}, **settings)  # half a minute or more in all
    wait_for(lambda: kafka.count(topics.output) >= 2_000, "2,000 results", every=0.02)
    wait_for(lambda: sum(kafka.committed(topics.group, topics.input).values()), "a commit")
    first.kill()
    committed = sum(kafka.committed(topics.group, topics.input).values())
    assert 0 < committed < 20_000, "killed half-way"
    workers.start(topics, cache_size=0, module="worker", model=checkpoint)
    wait_until_committed(kafka, topics)
    results = assert_none_missing(kafka, topics, sent)
    assert len(results) <= 20_000 + 5_000, "only what was in flight may come twice"


def test_workers_that_join_and_leave_lose_nothing(kafka: Kafka, topics: Topics, workers: Workers, load: Load) -> None:
    """Nothing comes twice either, as long as they leave of their own accord."""
    first = workers.start(topics).wait_until_assigned(4)
    load.start()
    second = workers.start(topics).wait_until_assigned(2)
    wait_for(lambda: len(first.metrics.by("partition", "consumer_lag_records")) == 2, "the lag of two partitions alone")
    assert first.metrics.get("rebalances_total") >= 2
    assert first.metrics.get("duplicates_possible_total") == 0
    assert first.terminate() == 0
    second.wait_until_assigned(4)
    before = kafka.count(topics.output)
    wait_for(lambda: kafka.count(topics.output) > before + 1_000, "1,000 results more")
    assert second.metrics.get("duplicates_possible_total") == 0
    assert not repeated(map(result_place, kafka.read(topics.output)))

    third = workers.start(topics).wait_until_assigned(2)
    second.kill()
    third.wait_until_assigned(4)
    sent = load.stop()
    wait_until_committed(kafka, topics)
    assert len(sent) > 5_000, "there was load all the time"
    assert_none_missing(kafka, topics, sent)


def test_a_terminated_worker_repeats_nothing(kafka: Kafka, topics: Topics, workers: Workers, load: Load) -> None:
    first = workers.start(topics, session_timeout_ms=60_000).wait_until_ready()
    load.start()
    wait_for(lambda: kafka.count(topics.output) >= 2_000, "2,000 results")
    assert first.terminate() == 0, "drained within drain_timeout_s"
    wait_for(lambda: not kafka.members(topics.group), "the group to have been left, before the session's end", 30)
    published = places(kafka.read(topics.output))
    committed = kafka.committed(topics.group, topics.input)
    assert sum(committed.values()) == len(published) == published.total()
    assert first.lines("Traceback") == []

    second = workers.start(topics).wait_until_ready()
    sent = load.stop()
    wait_until_committed(kafka, topics)
    assert second.terminate() == 0
    results = assert_none_missing(kafka, topics, sent)
    assert not repeated(map(result_place, results))
    assert_order_per_key(results)


def assert_order_per_key(results: list[Record]) -> None:
    last: dict[bytes | None, int] = {}
    for record in results:  # in the order of partition and offset
        place = result_place(record)
        assert place is not None
        assert last.get(record.key, -1) < place[2], f"key {record.key!r} is out of order"
        last[record.key] = place[2]


def test_an_output_topic_that_takes_nothing(kafka: Kafka, topics: Topics, workers: Workers) -> None:
    """Backpressure up to Kafka: the member stays in its group, says that it is not ready, and its lag is the truth.

    The topic is deleted under the worker, for a single broker acknowledges all that it has a topic for.
    """
    kafka.create_all(topics, 2)
    worker = workers.start(topics, cache_size=0).wait_until_assigned(2)
    kafka.delete(topics.output)
    members = kafka.members(topics.group)
    hundred_seconds_ago = int(time.time() * 1000) - 100_000
    sent = kafka.send(topics.input, [at(numbered(number), hundred_seconds_ago) for number in range(20_000)])
    ends = {str(partition): float(end) for partition, end in kafka.ends(topics.input).items()}

    worker.wait_for_status("/readyz", 503)
    wait_for(lambda: worker.metrics.by("partition", "consumer_lag_records") == ends, f"a lag of {ends}")
    rebalances = worker.metrics.get("rebalances_total")
    holds_for(lambda: kafka.members(topics.group) == members, "the same member", 9, every=1)  # the session: 6 s
    metrics = worker.metrics
    assert metrics.get("rebalances_total") == rebalances
    assert metrics.by("partition", "consumer_lag_records") == ends
    assert metrics.get("records_consumed_total") == metrics.get("results_published_total") == 0
    assert 0 < metrics.get("queue_depth") < 10_000, "the queues are bounded"
    for seconds in metrics.by("partition", "consumer_lag_seconds").values():
        assert seconds == pytest.approx(time.time() - hundred_seconds_ago / 1000, abs=30)
    assert worker.status("/livez") == 200

    assert topics.output not in kafka.names()
    kafka.create(topics.output, 2)
    wait_until_committed(kafka, topics)
    worker.wait_until_ready()
    wait_for(lambda: worker.metrics.get("consumer_lag_records") == 0, "a lag of 0")
    waited = time.time() - hundred_seconds_ago / 1000
    metrics = worker.metrics
    assert metrics.get("end_to_end_seconds_count") == len(sent)
    assert 100 * len(sent) < metrics.get("end_to_end_seconds_sum") < waited * len(sent)
    assert metrics.get("end_to_end_seconds_bucket", le="60.0") == 0
    assert metrics.by("partition", "consumer_lag_seconds") == {"0": 0, "1": 0}
    assert worker.terminate() == 0
    results = assert_none_missing(kafka, topics, sent)
    assert not repeated(map(result_place, results))


def at(record: Record, timestamp: int) -> Record:
    return Record(record.value, record.key, timestamp=timestamp)


def test_offsets_that_are_gone_are_counted(kafka: Kafka, topics: Topics, workers: Workers) -> None:
    kafka.create_all(topics, 1)
    kafka.send(topics.input, map(numbered, range(100)))
    first = workers.start(topics)
    wait_until_committed(kafka, topics)
    assert first.metrics.get("offset_resets_total") == 0, "a first start is no reset"
    assert first.terminate() == 0

    kafka.send(topics.input, map(numbered, range(100)))
    kafka.delete_before(topics.input, 0, 150)
    second = workers.start(topics)
    wait_until_committed(kafka, topics)
    assert second.metrics.get("offset_resets_total") == 1
    assert second.lines(topics.input, "100", "150"), "it says from where to where"
    assert second.terminate() == 0
    expected = {(topics.input, 0, offset) for offset in [*range(100), *range(150, 200)]}
    results = [result_place(record) for record in kafka.read(topics.output)]
    assert sorted(results, key=str) == sorted(expected, key=str)


def test_a_running_consumer_whose_offset_is_gone(kafka: Kafka, topics: Topics, workers: Workers) -> None:
    """The records are deleted under a worker that stands still: it finds out while it runs."""
    kafka.create_all(topics, 1)
    worker = workers.start(topics, session_timeout_ms=60_000).wait_until_assigned(1)  # it stays a member meanwhile
    worker.pause()
    kafka.send(topics.input, map(numbered, range(100)))
    kafka.delete_before(topics.input, 0, 60)
    worker.resume()
    wait_until_committed(kafka, topics)
    results = {result_place(record) for record in kafka.read(topics.output)}
    assert results >= {(topics.input, 0, offset) for offset in range(60, 100)}
    if len(results) < 100:  # it may have had them in its hands before they were deleted
        assert worker.metrics.get("offset_resets_total") == 1
