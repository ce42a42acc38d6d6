"""Each input record comes out once for a reader with read_committed, whatever happens to the workers."""

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial

import orjson
import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from confluent_kafka import Producer

from tests.support.broker import Broker
from tests.support.process import COSTLESS, WorkerProcess, Workers
from tests.support.scenario import letter_place, result_place, wait_until_committed
from tests.support.topics import Kafka, Load, Record, Topics, numbered
from tests.support.waiting import holds_for, wait_for

pytestmark = pytest.mark.kafka


@pytest.fixture
def worker_module() -> str:
    return COSTLESS


EXACTLY: dict[str, object] = {"delivery": "exactly-once", "cache_size": 0}
# For transactions that do not fail: on a busy machine brokers may take longer than a worker waits for them.
PATIENT = {"INTERVALS": '{"TRANSACTION_TIMEOUT_S": 120, "DEADLINE_S": 100}'}


@pytest.fixture
def load(kafka: Kafka, topics: Topics) -> Iterator[Load]:
    """1,000 events a second into a topic of four partitions, from `start` on."""
    kafka.create_all(topics, 4)
    load = Load(kafka, topics.input, 1000)
    yield load
    load.end()


def assert_once(kafka: Kafka, topics: Topics, sent: list[Record]) -> None:
    """Every record sent came out once, as what it has to become.

    Readers wait for what a killed worker has left open: brokers abort it after the transaction's timeout.
    """
    wait_for(
        lambda: not any(map(kafka.has_open_transaction, (topics.output, topics.dead_letters))),
        "no open transaction",
        60,
    )
    output, letters = kafka.read(topics.output), kafka.read(topics.dead_letters)
    results = Counter(result_place(record) for record in output if record.value is not None)
    dead = Counter(map(letter_place, letters))
    nulls = Counter(record.key for record in output if record.value is None)
    twice = [place for place, times in (results + dead).items() if times > 1]
    assert not twice, f"{len(twice)} came out twice, such as {twice[:3]}"
    good = {record.place for record in sent if record.value not in (None, b"{")}
    lost = good - set(results)
    assert not lost, f"{len(lost)} of {len(sent)} are lost, such as {sorted(lost)[:3]}"
    assert set(results) == good
    assert set(dead) == {record.place for record in sent if record.value == b"{"}
    assert nulls == Counter(record.key for record in sent if record.value is None)


def assert_all_counted(workers: list[WorkerProcess], sent: list[Record]) -> None:
    """For workers that were not killed: what they count is what they committed."""
    for worker in workers:
        metrics = worker.metrics
        assert metrics.get("duplicates_possible_total") == 0
        assert metrics.get("records_consumed_total") == metrics.outcomes
    assert sum(worker.metrics.outcomes for worker in workers) == len(sent)


def freeze_in_a_transaction(worker: WorkerProcess, kafka: Kafka, topics: Topics) -> bool:
    """Stops the worker where its transaction is open and its end not on its way; else lets it go on.

    An end that was asked for is there within milliseconds, and half a second later at the latest.
    """
    worker.pause()
    ends_at = time.monotonic() + 0.5
    while kafka.has_open_transaction(topics.output):
        if time.monotonic() > ends_at:
            return True
    worker.resume()
    return False


def mixed(number: int) -> Record:
    """Of a hundred records one is a tombstone and one cannot be scored."""
    record = numbered(number)
    kinds = {7: Record(None, b"null %d" % number), 8: Record(b"{", record.key)}
    return kinds.get(number % 100, record)


def test_killed_workers_lose_and_repeat_nothing(
    kafka: Kafka, topics: Topics, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results, dead letters and tombstones, with workers killed again and again in the middle of transactions."""
    monkeypatch.setenv("PASS_SECONDS", "0.1")  # of 64 texts each: most are left when the last one is killed
    kafka.create_all(topics, 4)
    sent = kafka.send(topics.input, map(mixed, range(20_000)))
    for goal in (1_000, 3_000, 5_000):
        worker = workers.start(topics, max_batch_texts=64, **EXACTLY)
        wait_for(lambda goal=goal: kafka.count(topics.output) >= goal, f"{goal} results", every=0.01)  # type: ignore[misc]
        wait_for(lambda: freeze_in_a_transaction(worker, kafka, topics), "a transaction to be killed in", every=0.01)  # noqa: B023
        worker.kill()
    assert 0 < sum(kafka.committed(topics.group, topics.input).values()) < 20_000, "killed half-way"
    worker = workers.start(topics, **EXACTLY).wait_until_assigned(4)
    wait_until_committed(kafka, topics)
    assert worker.terminate() == 0
    assert_once(kafka, topics, sent)
    uncommitted = len(kafka.read(topics.output, committed_only=False)) - len(kafka.read(topics.output))
    assert uncommitted > 0, "no worker was killed within a transaction: this has shown nothing"


def test_a_zombie_and_workers_that_join_and_leave_lose_and_repeat_nothing(
    kafka: Kafka, topics: Topics, workers: Workers, load: Load
) -> None:
    first = workers.start(topics, **EXACTLY).wait_until_assigned(4)
    load.start()
    wait_for(lambda: kafka.count(topics.output) >= 1_000, "1,000 results")
    first.pause()
    second = workers.start(topics, **EXACTLY).wait_until_assigned(4)  # after the first one's session
    before = kafka.count(topics.output)
    wait_for(lambda: kafka.count(topics.output) > before + 1_000, "1,000 results more")
    first.resume()
    first.wait_until_assigned(2)
    assert second.is_running
    assert second.terminate() == 0
    first.wait_until_assigned(4)
    third = workers.start(topics, **EXACTLY).wait_until_assigned(2)
    before = kafka.count(topics.output)
    wait_for(lambda: kafka.count(topics.output) > before + 1_000, "1,000 results more")
    assert first.terminate() == 0
    third.wait_until_assigned(4)
    sent = load.stop()
    wait_until_committed(kafka, topics)
    lags = dict.fromkeys("0123", 0.0)
    wait_for(lambda: third.metrics.by("partition", "consumer_lag_records") == lags, "a lag of 0")
    assert third.metrics.get("duplicates_possible_total") == 0
    assert third.terminate() == 0
    assert_once(kafka, topics, sent)


def test_another_process_with_the_same_transactional_id_fences_the_worker(
    kafka: Kafka, topics: Topics, workers: Workers, load: Load
) -> None:
    """It fences the worker, which is still the owner by the group: it takes the id back, says why, and goes on."""
    settings = {"group_instance_id": "member", "session_timeout_ms": 60_000, **EXACTLY}
    worker = workers.start(topics, **settings).wait_until_assigned(4)
    load.start()
    for _ in range(3):
        before = kafka.count(topics.output)
        wait_for(lambda before=before: kafka.count(topics.output) > before + 500, "500 results more")  # type: ignore[misc]
        errors = worker.metrics.get("kafka_errors_total", operation="transaction")
        stranger = {"bootstrap.servers": kafka.bootstrap, "transactional.id": f"{topics.group}/member"}
        Producer(stranger).init_transactions(60)
        wait_for(
            lambda errors=errors: worker.metrics.get("kafka_errors_total", operation="transaction") > errors,  # type: ignore[misc]
            "the worker to notice",
        )
    sent = load.stop()
    wait_until_committed(kafka, topics)
    worker.wait_until_ready()
    assert worker.metrics.get("rebalances_total") == 1
    wait_for(lambda: worker.metrics.outcomes == len(sent), "every record to be counted")
    assert_all_counted([worker], sent)
    assert worker.lines("Traceback") == []
    assert worker.lines(f"another process uses the transactional id {topics.group}/member")
    assert worker.terminate() == 0
    assert_once(kafka, topics, sent)


def test_a_rebalance_ends_the_open_transaction_before_the_partitions_go(
    kafka: Kafka, topics: Topics, workers: Workers, load: Load
) -> None:
    """It is committed at once, however long it might have lasted: nothing is aborted, read or scored again."""
    first = workers.start(topics, PATIENT, transaction_ms=3_000, **EXACTLY).wait_until_assigned(4)
    load.start()
    wait_for(lambda: first.metrics.outcomes >= 1_000, "1,000 results")
    wait_for(lambda: kafka.has_open_transaction(topics.output), "an open transaction", every=0.02)
    second = workers.start(topics, PATIENT, transaction_ms=3_000, **EXACTLY).wait_until_assigned(2)
    first.wait_until_assigned(2)
    wait_for(lambda: second.metrics.outcomes >= 500, "500 results of the other one")
    sent = load.stop()
    wait_until_committed(kafka, topics)
    wait_for(lambda: first.metrics.outcomes + second.metrics.outcomes == len(sent), "every record to be counted")
    assert_all_counted([first, second], sent)
    for worker in (first, second):
        assert worker.warnings("a transaction is given up") == []
        assert worker.terminate() == 0
    assert len(kafka.read(topics.output, committed_only=False)) == len(sent)
    assert_once(kafka, topics, sent)


def test_a_restarted_static_member_ends_the_transaction_of_the_process_before(
    kafka: Kafka, topics: Topics, workers: Workers, load: Load
) -> None:
    """It waits neither for the session nor for the transaction's timeout, and nor does a reader."""
    patient = {"INTERVALS": '{"TRANSACTION_TIMEOUT_S": 600}'}
    settings = {"group_instance_id": "member", "session_timeout_ms": 600_000, "transaction_ms": 3_000, **EXACTLY}
    worker = workers.start(topics, patient, **settings).wait_until_assigned(4)
    load.start()
    wait_for(lambda: freeze_in_a_transaction(worker, kafka, topics), "a transaction to be killed in", every=0.01)
    worker.kill()
    assert kafka.has_open_transaction(topics.output), "this has shown nothing"
    worker = workers.start(topics, **settings)
    sent = load.stop()
    wait_until_committed(kafka, topics, 200)  # a third of the session and of the transaction's timeout
    assert worker.terminate() == 0
    assert_once(kafka, topics, sent)


def test_static_members_that_are_killed_replaced_and_come_back_lose_and_repeat_nothing(
    kafka: Kafka, topics: Topics, workers: Workers
) -> None:
    """One is killed; another is stopped in a transaction, replaced under its id, and goes on beside its successor."""
    kafka.create_all(topics, 12)
    load = Load(kafka, topics.input, 1_000)

    def start(number: int) -> WorkerProcess:
        settings = {"group_instance_id": f"member-{number}", "session_timeout_ms": 10_000, "transaction_ms": 300}
        return workers.start(topics, **settings, **EXACTLY)

    def more() -> None:
        before = kafka.count(topics.output)
        wait_for(lambda: kafka.count(topics.output) > before + 1_000, "1,000 results more")

    fleet = [start(number) for number in range(3)]
    for worker in fleet:
        worker.wait_until_assigned(4)
    load.start()
    try:
        for number in range(3):
            more()
            fleet[number].kill()
            fleet[number] = start(number).wait_until_assigned(4)
            more()
            zombie = fleet[number]
            is_frozen = partial(freeze_in_a_transaction, zombie, kafka, topics)
            wait_for(is_frozen, "a transaction to be stopped in", every=0.01)
            fleet[number] = start(number).wait_until_assigned(4)
            more()
            zombie.resume()
            assert zombie.wait() == 2, "it says that its id is used by another process"
            more()
    finally:
        sent = load.stop()
    wait_until_committed(kafka, topics)
    assert [worker.terminate() for worker in fleet] == [0, 0, 0]
    assert_once(kafka, topics, sent)


def test_a_deleted_topic_holds_up_the_others_for_one_transaction(
    kafka: Kafka, topics: Topics, workers: Workers
) -> None:
    """Its partition stays assigned until the group's leader notices, which here reads the other topic alone."""
    kafka.create_all(topics, 4)
    deleted = f"{topics.input}.deleted"
    kafka.create(deleted)
    settings = {"input_topics": f"{topics.input},{deleted}", "transaction_ms": 2_000, **EXACTLY}
    settings |= {"session_timeout_ms": 60_000}  # who is frozen stays a member
    leader = workers.start(topics, group_instance_id="b", **settings).wait_until_assigned(5)
    worker = workers.start(topics, group_instance_id="a", **settings).wait_until_assigned(3)
    load = Load(kafka, deleted, 300)
    load.start()
    wait_for(lambda: kafka.committed(topics.group, deleted).get(0, 0) > 300, "the topic to be read")
    # Nothing else is read, so what is in the transaction is of that topic.
    wait_for(lambda: freeze_in_a_transaction(worker, kafka, topics), "a transaction to be frozen in", every=0.01)
    load.stop()
    kafka.delete(deleted)
    worker.resume()
    sent = kafka.send(topics.input, map(numbered, range(1_000)))
    wait_until_committed(kafka, topics)
    assert leader.is_running
    assert worker.lines("the brokers do not know")
    read = Counter(map(result_place, kafka.read(topics.output)))
    assert [read[record.place] for record in sent] == [1] * len(sent)


async def test_a_partition_whose_offset_another_process_has_in_a_transaction_waits_and_says_so(
    kafka: Kafka, topics: Topics, workers: Workers
) -> None:
    """The others are read meanwhile, and the worker stays in its group."""
    kafka.create_all(topics, 2)
    stranger = AIOKafkaProducer(
        bootstrap_servers=kafka.bootstrap, transactional_id=topics.input, transaction_timeout_ms=300_000
    )
    await stranger.start()
    await stranger.begin_transaction()
    held = TopicPartition(topics.input, 0)
    await stranger.send_offsets_to_transaction({held: 5}, topics.group)  # brokers take it while the group is empty

    reason = f"waiting for the end of a transaction that another process has left open: {topics.input}-0"

    def while_it_is_open() -> WorkerProcess:
        records = [Record(numbered(number).value, partition=number % 2) for number in range(200)]
        kafka.send(topics.input, records)
        worker = workers.start(topics, session_timeout_ms=60_000, **EXACTLY)
        wait_for(lambda: worker.get("/readyz") == (503, f"takeover: {reason}\n"), "the reason")
        wait_for(lambda: kafka.committed(topics.group, topics.input) == {1: 100}, "the other partition to be done")
        assert worker.warnings(reason) == [reason]
        return worker

    def after_its_end(worker: WorkerProcess) -> None:
        wait_until_committed(kafka, topics)
        worker.wait_until_ready()
        assert worker.metrics.get("rebalances_total") == 1
        assert worker.terminate() == 0

    try:
        worker = await asyncio.to_thread(while_it_is_open)
        await stranger.abort_transaction()
        await asyncio.to_thread(after_its_end, worker)
    finally:
        await stranger.stop()


def test_records_that_the_broker_refuses_within_a_transaction_are_dead_letters(
    kafka: Kafka, topics: Topics, workers: Workers
) -> None:
    """It cannot be foreseen how large a compressed batch is: what is refused is found within the transaction."""
    kafka.create_all(topics, 1)
    worker = workers.start(topics, PATIENT, compression_type="gzip", **EXACTLY).wait_until_assigned(1)
    kafka.set_config(topics.output, "max.message.bytes", 20_000)
    kafka.set_config(topics.output, "message.timestamp.after.max.ms", 60_000)
    records = [numbered(number) for number in range(400)]
    large = (("h", os.urandom(30_000)),)
    records[60] = Record(orjson.dumps({"text": "большой"}), b"large", large)
    records[61] = Record(orjson.dumps({"text": "большой"}), b"large too", large)
    records[140] = Record(orjson.dumps({"text": "завтра"}), b"early", (), int(time.time() * 1000) + 600_000)
    sent = kafka.send(topics.input, records)
    wait_until_committed(kafka, topics)
    wait_for(lambda: worker.metrics.outcomes == len(sent), "every record to be counted")
    assert_all_counted([worker], sent)
    assert worker.metrics.counts_by("reason", "dead_letters_total") == {"result_too_large": 2, "invalid_timestamp": 1}
    assert not worker.warnings("a transaction is given up")
    assert worker.terminate() == 0
    letters = Counter(map(letter_place, kafka.read(topics.dead_letters)))
    assert letters == dict.fromkeys([(topics.input, 0, offset) for offset in (60, 61, 140)], 1)
    offsets = [place[2] for record in kafka.read(topics.output) if (place := result_place(record))]
    assert offsets == [offset for offset in range(400) if offset not in (60, 61, 140)], "each once and in order"


def test_sigterm_under_load_loses_and_repeats_nothing(
    kafka: Kafka, topics: Topics, workers: Workers, load: Load
) -> None:
    """What is under way is committed before it ends."""
    settings = {"transaction_ms": 2_000, "session_timeout_ms": 60_000, **EXACTLY}
    worker = workers.start(topics, PATIENT, **settings).wait_until_assigned(4)
    load.start()
    wait_for(lambda: kafka.count(topics.output) >= 2_000, "2,000 results")
    assert worker.terminate() == 0, "drained within drain_timeout_s"
    wait_for(lambda: not kafka.members(topics.group), "the group to have been left, before the session's end", 30)
    results = kafka.read(topics.output)
    assert len(results) == len(kafka.read(topics.output, committed_only=False)), "nothing was aborted"
    done = len(results)
    wait_for(lambda: sum(kafka.committed(topics.group, topics.input).values()) == done, "the last one's offsets")
    workers.start(topics, **EXACTLY)
    sent = load.stop()
    wait_until_committed(kafka, topics)
    assert_once(kafka, topics, sent)


def test_a_drain_whose_last_transaction_is_lost_is_no_clean_end(kafka: Kafka, topics: Topics, workers: Workers) -> None:
    kafka.create_all(topics, 1)
    slow = {"PASS_SECONDS": "4"}  # two passes, in which it is told to drain, and is frozen
    settings = {"max_batch_texts": 50, "group_instance_id": "member", "session_timeout_ms": 60_000, **EXACTLY}
    worker = workers.start(topics, slow, drain_timeout_s=120, **settings).wait_until_assigned(1)
    sent = kafka.send(topics.input, map(numbered, range(100)))
    wait_for(lambda: worker.metrics.get("queue_depth", stage="tokenized") > 0, "the model to have work", every=0.02)
    os.kill(worker.pid, signal.SIGTERM)
    wait_for(lambda: worker.lines("draining"), "the drain", every=0.02)
    worker.pause()
    names = {"bootstrap.servers": kafka.bootstrap, "transactional.id": f"{topics.group}/member"}
    Producer(names).init_transactions(60)
    worker.resume()
    assert worker.wait() == 1
    assert worker.warnings("records could not be committed, and will be read again")
    next_one = workers.start(topics, **settings)
    wait_until_committed(kafka, topics)
    assert next_one.terminate() == 0
    assert_once(kafka, topics, sent)


def test_a_broker_that_goes_away_under_load_loses_and_repeats_nothing(
    fragile_broker: Broker, topics: Topics, fragile_workers: Workers
) -> None:
    kafka = Kafka(fragile_broker.bootstrap)
    kafka.create_all(topics, 4)
    worker = fragile_workers.start(topics, **EXACTLY).wait_until_assigned(4)
    load = Load(kafka, topics.input, 500)
    load.start()
    try:
        wait_for(lambda: kafka.count(topics.output) >= 1_000, "1,000 results")
        fragile_broker.stop()
        holds_for(lambda: worker.is_running and worker.status("/livez") == 200, "the worker is alive", 10)
        worker.wait_for_status("/readyz", 503)
        fragile_broker.start()
        worker.wait_until_ready()
        before = kafka.count(topics.output)
        wait_for(lambda: kafka.count(topics.output) >= before + 1_000, "new results")
    finally:
        load.end()
    sent = load.stop()
    wait_until_committed(kafka, topics, 120)
    assert worker.terminate() == 0
    assert_once(kafka, topics, sent)
