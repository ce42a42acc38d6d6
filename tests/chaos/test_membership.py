"""Who belongs to the group, and stays in it: static members, slow batches, silence, an open transaction upstream."""

from pathlib import Path

import pytest
from confluent_kafka import Producer

from tests.chaos.conftest import IS_LONG, BeginFeed
from tests.chaos.driver import MODEL, audited
from tests.support.process import WorkerProcess, Workers
from tests.support.scenario import wait_until_committed
from tests.support.topics import Kafka, Topics, numbered
from tests.support.waiting import holds_for, wait_for

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(900)]


def test_a_rolling_restart_of_static_members(
    kafka: Kafka, topics: Topics, light: Workers, begin_feed: BeginFeed
) -> None:
    """Each comes back as who it was within its session: nobody else notices, and nothing comes twice."""
    kafka.create_all(topics, 6)

    def start(number: int) -> WorkerProcess:
        return light.start(topics, module=MODEL, group_instance_id=f"member-{number}", session_timeout_ms=45_000)

    fleet = [start(number) for number in range(3)]
    for worker in fleet:
        worker.wait_until_assigned(2)
    rebalances = [worker.metrics.get("rebalances_total") for worker in fleet]
    feed = begin_feed(kafka, topics, 10_000, 300)
    for number in range(3):
        before = kafka.count(topics.output)
        wait_for(lambda before=before: kafka.count(topics.output) > before + 500, "500 results more")  # type: ignore[misc]
        assert fleet[number].terminate() == 0
        fleet[number] = start(number).wait_until_assigned(2)
        now = [worker.metrics.get("rebalances_total") for worker in fleet]
        assert now == [*([1.0] * (number + 1)), *rebalances[number + 1 :]], "no rebalance but one's own first"
    feed.finish()
    wait_until_committed(kafka, topics, 300)
    assert [worker.terminate() for worker in fleet] == [0, 0, 0]
    assert audited(kafka, topics).failures("exactly-once") == []


def test_two_processes_with_one_instance_id(kafka: Kafka, topics: Topics, light: Workers) -> None:
    """Of two that start at once, whoever joins last goes on, and the other one ends and says why."""
    kafka.create_all(topics, 2)
    twins = [light.start(topics, module=MODEL, group_instance_id="twin") for _ in range(2)]
    wait_for(lambda: not all(twin.is_running for twin in twins), "one of them to end")
    kafka.send(topics.input, map(numbered, range(100)))
    wait_until_committed(kafka, topics, 300)
    (gone,) = [twin for twin in twins if not twin.is_running]
    (stays,) = [twin for twin in twins if twin.is_running]
    assert gone.wait() == 2
    assert "'twin' is used by another process" in gone.output
    assert not any(twin.lines("Traceback") for twin in twins)
    assert stays.terminate() == 0


def test_a_batch_that_takes_longer_than_any_session(
    kafka: Kafka, topics: Topics, light: Workers, tmp_path: Path
) -> None:
    """The member stays a member, and nobody rejoins. The long form lasts longer than Kafka's max.poll.interval.ms."""
    seconds = 310 if IS_LONG else 20
    fault = tmp_path / "fault"
    kafka.create_all(topics, 2)
    worker = light.start(
        topics, {"FAULT_FILE": str(fault)}, module=MODEL, inference_timeout_s=seconds + 60
    ).wait_until_assigned(2)
    members, rebalances = kafka.members(topics.group), worker.metrics.get("rebalances_total")
    fault.write_text(f"hang {seconds}")
    kafka.send(topics.input, map(numbered, range(100)))
    holds_for(
        lambda: kafka.members(topics.group) == members and worker.metrics.get("rebalances_total") == rebalances,
        "the same member, and no rebalance",
        seconds - 5,
        every=1,
    )
    assert kafka.count(topics.output) == 0, "the batch was over too early: this has shown nothing"
    assert worker.status("/livez") == 200
    fault.unlink()
    wait_until_committed(kafka, topics, 300)
    assert kafka.count(topics.output) == 100
    assert worker.metrics.get("rebalances_total") == rebalances
    assert worker.terminate() == 0


def test_a_consumer_that_falls_silent(kafka: Kafka, topics: Topics, light: Workers, tmp_path: Path) -> None:
    """Its heart beats, records are there, and it is given none: it is made anew."""
    mute = tmp_path / "mute"
    kafka.create_all(topics, 2)
    variables = {"MUTE_FILE": str(mute), "INTERVALS": '{"SILENCE_S": 3}'}
    worker = light.start(topics, variables, module=MODEL).wait_until_assigned(2)
    mute.touch()
    kafka.send(topics.input, map(numbered, range(100)))
    wait_until_committed(kafka, topics, 300)
    assert kafka.count(topics.output) == 100
    assert worker.warnings("has sent none for 3 s")
    rebalances = worker.metrics.get("rebalances_total")
    holds_for(lambda: worker.metrics.get("rebalances_total") == rebalances, "no rejoin more", 5)
    assert worker.terminate() == 0


def test_a_transaction_that_stays_open_upstream(kafka: Kafka, topics: Topics, light: Workers) -> None:
    """What is in it cannot be read yet. It is no lag, and no silence either."""
    kafka.create_all(topics, 1)
    kafka.send(topics.input, map(numbered, range(100)))
    worker = light.start(topics, {"INTERVALS": '{"SILENCE_S": 3}'}, module=MODEL).wait_until_assigned(1)
    wait_until_committed(kafka, topics, 300)
    upstream = Producer({"bootstrap.servers": kafka.bootstrap, "transactional.id": topics.input, "log_level": 0})
    upstream.init_transactions(30)
    upstream.begin_transaction()
    for number in range(50):
        upstream.produce(topics.input, numbered(number).value)
    assert upstream.flush(30) == 0
    kafka.send(topics.input, map(numbered, range(30)))
    assert kafka.ends(topics.input) == {0: 180}
    rebalances = worker.metrics.get("rebalances_total")
    holds_for(
        lambda: (
            worker.metrics.get("consumer_lag_records") == 0 and worker.metrics.get("rebalances_total") == rebalances
        ),
        "no lag, and no rejoin",
        8,
    )
    assert kafka.count(topics.output) == 100

    upstream.commit_transaction(30)
    wait_for(lambda: kafka.count(topics.output) == 180, "what was behind it")
    wait_for(lambda: worker.metrics.get("consumer_lag_records") == 0, "a lag of 0")
    assert worker.metrics.get("rebalances_total") == rebalances
    assert worker.terminate() == 0
