"""Transactions that this process does not end: brokers abort them for their age, or the group has gone on without it."""

import os
import signal
from collections.abc import Iterator

import pytest

from tests.integration.test_exactly_once import EXACTLY, assert_once, freeze_in_a_transaction
from tests.support.process import COSTLESS, Workers
from tests.support.scenario import wait_until_committed
from tests.support.topics import Kafka, Load, Topics
from tests.support.waiting import wait_for

pytestmark = pytest.mark.kafka


@pytest.fixture
def worker_module() -> str:
    return COSTLESS


@pytest.fixture
def load(kafka: Kafka, topics: Topics) -> Iterator[Load]:
    kafka.create_all(topics, 4)
    load = Load(kafka, topics.input, 500)
    yield load
    load.end()


def test_a_transaction_that_brokers_abort_for_its_age_is_told_and_done_again(
    kafka: Kafka, topics: Topics, workers: Workers, load: Load
) -> None:
    """The process was frozen for longer than the transaction's timeout, and is a member of its group all the same."""
    settings = {"transaction_ms": 2_000, "session_timeout_ms": 300_000, **EXACTLY}
    worker = workers.start(topics, **settings).wait_until_assigned(4)
    load.start()
    wait_for(lambda: kafka.count(topics.output) >= 500, "500 results")
    wait_for(lambda: freeze_in_a_transaction(worker, kafka, topics), "a transaction to be frozen in", every=0.01)
    wait_for(lambda: not kafka.has_open_transaction(topics.output), "the brokers to abort it", every=0.2)
    worker.resume()
    before = kafka.count(topics.output)
    wait_for(lambda: kafka.count(topics.output) > before + 500, "500 results more")
    sent = load.stop()
    wait_until_committed(kafka, topics)
    wait_for(lambda: worker.metrics.outcomes == len(sent), "every record to be counted")
    assert worker.metrics.get("rebalances_total") == 1
    (told,) = worker.warnings("a transaction is given up")
    assert worker.lines("it was open for more than 10 s"), told
    assert worker.terminate() == 0
    assert_once(kafka, topics, sent)
    aborted = len(kafka.read(topics.output, committed_only=False)) - len(sent)
    assert aborted > 0, "nothing was published in the transaction that was aborted: this has shown nothing"


@pytest.mark.parametrize("is_refused_before", [False, True], ids=["told to end first", "refused first"])
def test_a_zombie_that_is_told_to_end_ends_well(
    kafka: Kafka, topics: Topics, workers: Workers, load: Load, is_refused_before: bool
) -> None:
    """Another process has its partitions, and reads what it had taken of them: nothing is lost with it."""
    slow = {"PASS_SECONDS": "0.2"}
    zombie = workers.start(topics, slow, max_batch_texts=64, transaction_ms=1_000, **EXACTLY).wait_until_assigned(4)
    load.start()
    wait_for(lambda: zombie.metrics.outcomes >= 200, "200 results")
    wait_for(lambda: freeze_in_a_transaction(zombie, kafka, topics), "a transaction to be frozen in", every=0.01)
    heir = workers.start(topics, **EXACTLY).wait_until_assigned(4)
    if is_refused_before:
        zombie.resume()
        wait_for(lambda: zombie.lines("the group has gone on without this member"), "the refusal", every=0.02)
        os.kill(zombie.pid, signal.SIGTERM)
    else:
        os.kill(zombie.pid, signal.SIGTERM)
        zombie.resume()
    assert zombie.wait() == 0, zombie.output[-3000:]
    sent = load.stop()
    wait_until_committed(kafka, topics)
    assert heir.terminate() == 0
    assert_once(kafka, topics, sent)
