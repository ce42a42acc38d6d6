"""`run --until`: every record before the end, none after it, whoever reads it; and `--since`, where a group begins."""

import re
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import orjson
import pytest
from confluent_kafka.admin import NewPartitions

from tests.support.broker import Broker
from tests.support.process import COSTLESS, WorkerProcess, Workers
from tests.support.scenario import places
from tests.support.topics import Kafka, Record, Topics, numbered
from tests.support.waiting import wait_for

pytestmark = pytest.mark.kafka
DELIVERIES = pytest.mark.parametrize("delivery", ["at-least-once", "exactly-once"])
HOUR_MS = 3_600_000
END = "2026-01-01T00:00:00Z"
END_MS = 1_767_225_600_000
FINISHED = "every partition is read to its end"


@pytest.fixture
def worker_module() -> str:
    return COSTLESS


def dated(number: int, time_ms: int, partition: int = -1) -> Record:
    record = numbered(number)
    return Record(record.value, record.key, (), time_ms, partition=partition)


def send_around_the_end(kafka: Kafka, topic: str, before: int, after: int) -> tuple[list[Record], list[Record]]:
    """Records of the hour before the end, then as many of the time from then on; the first of those at that very moment."""
    step = HOUR_MS // before
    old = [dated(number, END_MS - HOUR_MS + number * step) for number in range(before)]
    new = [dated(number, END_MS + number) for number in range(after)]
    return kafka.send(topic, old), kafka.send(topic, new)


def finished(worker: WorkerProcess) -> dict[str, int]:
    """The sum in the last line of a worker that ended with 0."""
    assert worker.wait(150) == 0, worker.output[-3000:]
    (line,) = [line for line in worker.logs if line["message"] == FINISHED]
    sum_ = {name: line[name] for name in ("consumed", "results", "dead_letters", "tombstones", "skipped")}
    assert sum_["consumed"] == sum(count for name, count in sum_.items() if name != "consumed")
    return sum_


def settled_offset(kafka: Kafka, topics: Topics) -> int:
    """The committed offset of the only partition, whose records all have results, once it is that of the last of these."""
    done = len(places(kafka.read(topics.output)))
    wait_for(lambda: kafka.committed(topics.group, topics.input) == {0: done}, "the last transaction's offset")
    return done


@DELIVERIES
@pytest.mark.parametrize("until", [END, "now"])
def test_three_workers_a_kill_and_a_rebalance(
    kafka: Kafka, topics: Topics, workers: Workers, delivery: str, until: str
) -> None:
    kafka.create_all(topics, 6)
    before, _ = send_around_the_end(kafka, topics.input, 12_000, 3_000)
    settings = {"until": until, "delivery": delivery, "max_batch_texts": 100, "cache_size": 0}
    members = [workers.start(topics, {"PASS_SECONDS": "0.1"}, **settings) for _ in range(3)]
    wait_for(lambda: len(kafka.committed(topics.group, topics.input)) == 6, "every partition to have a bound")
    if until == "now":
        before = before + [record for record in kafka.read(topics.input) if record.timestamp >= END_MS]
        kafka.send(topics.input, [dated(number, int(time.time() * 1000)) for number in range(3_000)])
    wait_for(lambda: len(kafka.read(topics.output)) > 1_000, "some results")
    members[0].kill()
    late = workers.start(topics, {"PASS_SECONDS": "0.1"}, **settings)
    sums = [finished(worker) for worker in (*members[1:], late)]
    wait_for(
        lambda: not kafka.has_open_transaction(topics.output), "brokers to abort what the killed one has left open"
    )

    found = places(kafka.read(topics.output))
    assert set(found) == {record.place for record in before}, "every record before the end, and none after it"
    if delivery == "exactly-once":
        assert set(found.values()) == {1}
    assert sum(each["consumed"] for each in sums) <= found.total()
    ends = Counter(record.partition for record in before)
    wait_for(lambda: kafka.committed(topics.group, topics.input) == ends, "the last transaction's offsets")
    bounds = {
        partition: re.fullmatch(r"until=(\d+);end=(\d+);topic_id=\S{22}", commit.metadata)
        for partition, commit in kafka.commits(topics.group).items()
    }
    assert {partition: int(bound[2]) for partition, bound in bounds.items() if bound} == ends
    assert len({bound[1] for bound in bounds.values() if bound}) == 1, "all members agree on the time"

    again = workers.start(topics, **settings)
    assert finished(again) == dict.fromkeys(("consumed", "results", "dead_letters", "tombstones", "skipped"), 0)
    assert places(kafka.read(topics.output)) == found


@DELIVERIES
def test_ends_that_no_record_is_at(kafka: Kafka, topics: Topics, workers: Workers, delivery: str) -> None:
    """An empty partition; markers and aborted records at the end; a begin that retention has taken; a gap before the end."""
    kafka.create_all(topics, 5)
    old = END_MS - HOUR_MS
    producer = kafka.begin_transaction(topics.group)
    for partitions, ends in (((1, 2, 4), producer.commit_transaction), ((2, 4), producer.abort_transaction)):
        for partition in partitions:
            for number in range(10):
                producer.produce(topics.input, numbered(number).value, partition=partition, timestamp=old + number)
        producer.flush()
        ends()
        producer.begin_transaction()
    kafka.send(topics.input, [dated(number, old, 3) for number in range(20)])
    kafka.delete_before(topics.input, 3, 5)
    (late,) = kafka.send(topics.input, [dated(0, END_MS, 4)])  # behind aborted records, and perhaps behind their marker
    worker = workers.start(topics, until=END, delivery=delivery)
    assert finished(worker)["results"] == 10 + 10 + 15 + 10
    assert Counter(place[1] for place in places(kafka.read(topics.output)) if place) == {1: 10, 2: 10, 3: 15, 4: 10}
    done = {0: 0, 1: 11, 2: 22, 3: 20, 4: late.offset}
    wait_for(lambda: kafka.committed(topics.group, topics.input) == done, "the last transaction's offsets")


@DELIVERIES
def test_an_open_transaction_before_the_end_is_waited_for(
    kafka: Kafka, topics: Topics, workers: Workers, delivery: str
) -> None:
    kafka.create_all(topics, 1)
    producer = kafka.begin_transaction(topics.group)
    producer.produce(topics.input, numbered(0).value, timestamp=END_MS - 1)
    producer.flush()
    kafka.send(topics.input, [dated(1, END_MS - 1), dated(2, END_MS)])
    worker = workers.start(topics, until=END, delivery=delivery).wait_until_assigned(1)
    wait_for(lambda: kafka.committed(topics.group, topics.input) == {0: 0}, "the bound to be committed")
    time.sleep(2)
    assert worker.is_running
    producer.commit_transaction()
    assert finished(worker)["results"] == 2


@DELIVERIES
def test_partitions_that_are_added(kafka: Kafka, topics: Topics, workers: Workers, delivery: str) -> None:
    """The same command reads of them what is dated before its end, though it was finished."""
    kafka.create_all(topics, 1)
    first = kafka.send(topics.input, [dated(0, END_MS - 1)])
    finished(workers.start(topics, until=END, delivery=delivery))
    kafka.admin.create_partitions([NewPartitions(topics.input, 2)])[topics.input].result(30)
    wait_for(lambda: len(kafka.partitions(topics.input)) == 2, "the partition")
    added = kafka.send(topics.input, [dated(1, END_MS - 1, 1), dated(2, END_MS, 1)])
    assert finished(workers.start(topics, until=END, delivery=delivery))["results"] == 1
    assert places(kafka.read(topics.output)) == Counter([first[0].place, added[0].place])
    wait_for(lambda: kafka.committed(topics.group, topics.input) == {0: 1, 1: 1}, "the last transaction's offsets")


@DELIVERIES
@pytest.mark.parametrize("is_topic", [False, True])
def test_partitions_and_topics_that_come_during_the_run(
    kafka: Kafka, topics: Topics, workers: Workers, delivery: str, is_topic: bool
) -> None:
    """The worker's metadata are minutes old; what it did not know of is read before it ends."""
    kafka.create_all(topics, 1)
    producer = kafka.begin_transaction(topics.group)
    producer.produce(topics.input, numbered(0).value, timestamp=END_MS - 1)
    producer.flush()
    settings: dict[str, object] = {"until": END, "delivery": delivery, "session_timeout_ms": 60_000}
    if is_topic:
        settings |= {"input_topics": None, "input_pattern": f"{topics.input}.*"}
    often = {"INTERVALS": '{"TOPICS_INTERVAL_S": 2}'}
    workers_ = [workers.start(topics, often, **settings) for _ in range(2)]
    for worker in workers_:
        worker.wait_until_ready()
    wait_for(lambda: kafka.committed(topics.group, topics.input) == {0: 0}, "the bound to be committed")
    for worker in workers_:
        worker.pause()  # or one may find what is added before its records are sent: it would have nothing to read
    if is_topic:
        kafka.create(added := f"{topics.input}-added", 1)
        kafka.send(added, [dated(1, END_MS - 1, 0), dated(2, END_MS, 0)])
    else:
        kafka.admin.create_partitions([NewPartitions(topics.input, 2)])[topics.input].result(30)
        wait_for(lambda: len(kafka.partitions(topics.input)) == 2, "the partition")
        kafka.send(topics.input, [dated(1, END_MS - 1, 1), dated(2, END_MS, 1)])
    for worker in workers_:
        worker.resume()
    producer.commit_transaction()
    assert sum(finished(worker)["results"] for worker in workers_) == 2
    assert len(kafka.read(topics.output)) == 2


@DELIVERIES
def test_a_worker_that_has_no_partition_takes_over_from_one_that_is_killed(
    kafka: Kafka, topics: Topics, workers: Workers, delivery: str, tmp_path: Path
) -> None:
    kafka.create_all(topics, 1)
    before, _ = send_around_the_end(kafka, topics.input, 10_000, 10)
    settings = {"until": END, "delivery": delivery, "max_batch_texts": 50, "cache_size": 0}
    slow = {"PASS_SECONDS": "0.3", "FAST_FILE": str(tmp_path / "fast")}  # a minute, until one of them is killed
    pair = [workers.start(topics, slow, **settings) for _ in range(2)]
    for worker in pair:
        worker.wait_until_ready()

    def assigned() -> list[float]:
        return [worker.metrics.get("assigned_partitions") for worker in pair]

    wait_for(lambda: sum(assigned()) == 1, "one of them to have the partition")
    holder, other = pair if assigned()[0] else reversed(pair)
    holder.kill()
    (tmp_path / "fast").touch()
    assert 0 < finished(other)["consumed"] <= len(before)
    wait_for(
        lambda: not kafka.has_open_transaction(topics.output), "brokers to abort what the killed one has left open"
    )
    assert set(places(kafka.read(topics.output))) == {record.place for record in before}


def test_a_drain_before_the_end_is_no_success(kafka: Kafka, topics: Topics, workers: Workers) -> None:
    kafka.create_all(topics, 1)
    before, _ = send_around_the_end(kafka, topics.input, 10_000, 10)
    settings = {"until": END, "max_batch_texts": 50, "cache_size": 0}
    worker = workers.start(topics, {"PASS_SECONDS": "0.3"}, **settings).wait_until_assigned(1)  # a minute of work
    wait_for(lambda: kafka.count(topics.output) > 100, "some results")
    assert worker.terminate() == 1
    assert worker.lines("drained before the end of the run")
    finished(workers.start(topics, **settings))
    assert places(kafka.read(topics.output)) == Counter(record.place for record in before)


def test_a_group_of_others_is_refused(kafka: Kafka, topics: Topics, workers: Workers) -> None:
    kafka.create_all(topics, 1)
    kafka.send(topics.input, [dated(number, END_MS - 1) for number in range(10)])
    plain = workers.start(topics, session_timeout_ms=60_000).wait_until_assigned(1)
    wait_for(lambda: kafka.committed(topics.group, topics.input) == {0: 10}, "a commit")
    refused = workers.start(topics, until=END)
    assert refused.wait() == 2
    (sentence,) = refused.warnings("until needs a group_id of its own, which no other worker uses")
    assert "\n" not in sentence
    assert plain.metrics.get("rebalances_total") == 1, "it has not joined the group"
    plain.terminate()

    other = Topics(topics.input, topics.output, topics.dead_letters, topics.group + "2")
    finished(workers.start(other, until=END))
    refused = workers.start(other, until="2026-01-02T00:00Z")
    assert refused.wait() == 2
    assert refused.warnings("has offsets of a run until 2026-01-01T00:00:00.000Z")
    finished(workers.start(other, until="now"))  # it is resolved already


@pytest.mark.parametrize(("span", "results"), [({"since": "99999d"}, 10), ({"until": "1900-01-01"}, 0)])
def test_times_before_1970_are_its_begin(
    kafka: Kafka, topics: Topics, workers: Workers, span: dict[str, str], results: int
) -> None:
    kafka.create_all(topics, 1)
    kafka.send(topics.input, [dated(number, END_MS - 1) for number in range(10)])
    worker = workers.start(topics, **{"until": END} | span)
    assert finished(worker)["results"] == results
    assert finished(workers.start(topics, **{"until": END} | span))["consumed"] == 0


@DELIVERIES
def test_since(kafka: Kafka, topics: Topics, workers: Workers, delivery: str) -> None:
    kafka.create_all(topics, 2)
    sent = kafka.send(
        topics.input, [dated(number, END_MS - (100 - number) * 60_000, number % 2) for number in range(100)]
    )
    worker = workers.start(topics, since="2025-12-31T23:30Z", until=END, delivery=delivery)
    assert finished(worker)["results"] == 30
    results = kafka.read(topics.output)
    assert set(places(results)) == {record.place for record in sent[70:]}
    assert {orjson.loads(record.value or b"")["event_time"] for record in results} >= {"2025-12-31T23:30:00.000Z"}


@DELIVERIES
def test_times_that_brokers_give_and_dead_letters_at_the_end(
    kafka: Kafka, topics: Topics, workers: Workers, delivery: str
) -> None:
    """With LogAppendTime the end is a time of the brokers', whatever producers have said."""
    kafka.create_all(topics, 1)
    kafka.set_config(topics.input, "message.timestamp.type", "LogAppendTime")
    before = kafka.send(topics.input, [dated(number, END_MS) for number in range(20)])
    bad = kafka.send(topics.input, [Record(b"no JSON", b"key"), Record(None, b"tombstone"), Record(None, None)])
    wait_for(lambda: time.time() * 1000 > kafka.read(topics.input)[-1].timestamp + 10, "a time after the last one")
    end = f"{datetime.fromtimestamp(time.time(), UTC):%Y-%m-%dT%H:%M:%S.%fZ}"
    after = kafka.send(topics.input, [dated(number, END_MS - 1) for number in range(5)])
    assert finished(workers.start(topics, until=end, delivery=delivery)) == {
        "consumed": 23, "results": 20, "dead_letters": 1, "tombstones": 1, "skipped": 1
    }  # fmt: skip
    results = [record for record in kafka.read(topics.output) if record.value]
    assert places(results) == Counter(record.place for record in before)
    assert len(kafka.read(topics.dead_letters)) == 1
    done = {0: len(before) + len(bad)}
    wait_for(lambda: kafka.committed(topics.group, topics.input) == done, "the last transaction's offsets")
    assert after


@DELIVERIES
def test_a_broker_that_is_killed_in_the_midst(
    fragile_broker: Broker, topics: Topics, fragile_workers: Workers, delivery: str
) -> None:
    kafka = Kafka(fragile_broker.bootstrap)
    kafka.create_all(topics, 2)
    before, _ = send_around_the_end(kafka, topics.input, 4_000, 500)
    settings = {"until": END, "delivery": delivery, "max_batch_texts": 50, "cache_size": 0}
    worker = fragile_workers.start(topics, {"PASS_SECONDS": "0.1"}, **settings).wait_until_assigned(2)
    wait_for(lambda: kafka.count(topics.output) > 100, "some results")
    fragile_broker.kill()
    fragile_broker.start()
    assert finished(worker)["consumed"] >= len(before)
    found = places(kafka.read(topics.output))
    assert set(found) == {record.place for record in before}
    if delivery == "exactly-once":
        assert set(found.values()) == {1}


@DELIVERIES
def test_a_static_member_is_killed_and_told_to_drain_and_retention_takes_the_begin(
    kafka: Kafka, topics: Topics, workers: Workers, delivery: str
) -> None:
    kafka.create_all(topics, 1)
    send_around_the_end(kafka, topics.input, 4_000, 500)
    settings = {
        "until": "now", "since": "2025-12-31", "delivery": delivery, "max_batch_texts": 50, "cache_size": 0,
        "group_instance_id": "member", "session_timeout_ms": 45_000,
    }  # fmt: skip
    slow = {"PASS_SECONDS": "0.4"}  # half a minute in all
    first = workers.start(topics, slow, **settings).wait_until_assigned(1)
    wait_for(lambda: kafka.count(topics.output) > 100, "some results")
    first.kill()
    (commit,) = kafka.commits(topics.group).values()
    late = kafka.send(topics.input, [dated(number, END_MS) for number in range(100)])
    second = workers.start(topics, slow, **settings).wait_until_assigned(1)
    wait_for(lambda: kafka.count(topics.output) > 600, "more results")
    assert second.terminate() == 1
    committed = settled_offset(kafka, topics)
    kafka.delete_before(topics.input, 0, committed + 300)
    third = workers.start(topics, **settings)
    finished(third)
    assert third.lines("the offset to resume from is gone")
    expected = {place[2] for place in places(kafka.read(topics.output)) if place}
    gone = set(range(committed, committed + 300))
    assert expected | gone == set(range(4_500)), "nothing but what retention has taken"
    assert late[0].offset == 4_500
    again = [commit.metadata for commit in kafka.commits(topics.group).values()]
    assert again == [commit.metadata], "the end is the one that was committed first"
    if delivery == "exactly-once":
        assert set(places(kafka.read(topics.output)).values()) == {1}


@DELIVERIES
def test_retention_that_takes_the_end_too_hangs_nobody(
    kafka: Kafka, topics: Topics, workers: Workers, delivery: str
) -> None:
    kafka.create_all(topics, 1)
    send_around_the_end(kafka, topics.input, 2_000, 500)
    settings = {"until": END, "delivery": delivery, "max_batch_texts": 50, "cache_size": 0}
    first = workers.start(topics, {"PASS_SECONDS": "0.8"}, **settings).wait_until_assigned(1)  # half a minute in all
    wait_for(lambda: kafka.count(topics.output) > 100, "some results")
    assert first.terminate() == 1
    done = len(kafka.read(topics.output))
    kafka.delete_before(topics.input, 0, 2_300)
    second = workers.start(topics, **settings)
    assert finished(second)["consumed"] == 0
    assert second.lines("the offset to resume from is gone")
    assert len(kafka.read(topics.output)) == done
