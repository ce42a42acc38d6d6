"""A ``group_instance_id`` belongs to the process that joined with it last, as Kafka means it."""

import pytest

from tests.support.process import COSTLESS, Workers
from tests.support.scenario import wait_until_committed
from tests.support.topics import Kafka, Topics, numbered
from tests.support.waiting import wait_for

pytestmark = pytest.mark.kafka

SESSION_S = 180


@pytest.fixture
def worker_module() -> str:
    return COSTLESS


@pytest.mark.parametrize("delivery", ["at-least-once", "exactly-once"])
def test_the_newcomer_takes_over_and_goes_on(kafka: Kafka, topics: Topics, workers: Workers, delivery: str) -> None:
    """From a process that runs, which ends with 2, and from one that was killed, long before its session ends."""
    kafka.create_all(topics, 2)
    settings = {"delivery": delivery, "group_instance_id": "member", "session_timeout_ms": SESSION_S * 1000}

    def send_and_wait() -> None:
        kafka.send(topics.input, map(numbered, range(100)))
        wait_until_committed(kafka, topics, SESSION_S / 2)

    older = workers.start(topics, **settings).wait_until_assigned(2)
    send_and_wait()
    newcomer = workers.start(topics, **settings).wait_until_assigned(2)
    assert older.wait() == 2
    assert "group_instance_id 'member' is used by another process" in older.output
    assert older.lines("Traceback") == []
    send_and_wait()
    assert newcomer.metrics.get("rebalances_total") == 1, "nobody has thrown it out"

    newcomer.kill()
    restarted = workers.start(topics, **settings)
    wait_for(lambda: restarted.status("/readyz") == 200, "it to take over", SESSION_S / 2)
    send_and_wait()
    assert restarted.terminate() == 0
    assert len(kafka.read(topics.output)) == 300
