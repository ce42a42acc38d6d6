"""SIGTERM under load: nothing is lost, nothing comes twice, and the end comes in time."""

from pathlib import Path

import pytest

from tests.chaos.conftest import IS_LONG, BeginFeed
from tests.chaos.driver import MODEL, audited
from tests.support.process import Workers
from tests.support.scenario import wait_until_committed
from tests.support.topics import Kafka, Topics
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(1800)]

TIMES = 50 if IS_LONG else 5
DRAIN_S = 20  # drain_timeout_s


@pytest.mark.parametrize("delivery", ["at-least-once", "exactly-once"])
def test_sigterm_under_load_loses_nothing_time_after_time(
    kafka: Kafka, topics: Topics, light: Workers, begin_feed: BeginFeed, delivery: str
) -> None:
    kafka.create_all(topics, 6)
    feed = begin_feed(kafka, topics, 1_000_000, 500)
    for _ in range(TIMES):
        before = kafka.count(topics.output)
        worker = light.start(topics, module=MODEL, delivery=delivery, drain_timeout_s=DRAIN_S)
        wait_for(lambda before=before: kafka.count(topics.output) > before + 500, "500 results more", every=0.02)  # type: ignore[misc]
        assert worker.terminate(DRAIN_S) == 0
        assert worker.lines("Traceback") == []
    feed.stop()
    feed.finish()
    worker = light.start(topics, module=MODEL, delivery=delivery)
    wait_until_committed(kafka, topics, 300)
    assert worker.terminate() == 0
    assert audited(kafka, topics).failures("exactly-once") == []


def test_sigterm_while_the_model_hangs(
    kafka: Kafka, topics: Topics, light: Workers, begin_feed: BeginFeed, tmp_path: Path
) -> None:
    fault = tmp_path / "fault"
    kafka.create_all(topics, 6)
    feed = begin_feed(kafka, topics, 5_000, 500)
    worker = light.start(topics, {"FAULT_FILE": str(fault)}, module=MODEL, drain_timeout_s=3)
    wait_for(lambda: kafka.count(topics.output) > 500, "500 results")
    fault.write_text("hang 3600")
    wait_for(lambda: worker.metrics.get("queue_depth") > 500, "records that wait for the model")
    assert worker.terminate(DRAIN_S) == 1
    assert worker.warnings("could not be finished within drain_timeout_s = 3")
    fault.unlink()
    feed.finish()
    worker = light.start(topics, module=MODEL)
    wait_until_committed(kafka, topics, 300)
    assert worker.terminate() == 0
    found = audited(kafka, topics)
    assert found.failures("at-least-once") == []
    assert found.events == 5_000
