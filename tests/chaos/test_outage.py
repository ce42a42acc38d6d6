"""The broker is away under load, for a minute in the long form; and a producer that is renewed in time."""

import pytest

from tests.chaos.conftest import IS_LONG, BeginFeed
from tests.chaos.driver import MODEL, audited, resident_bytes, wait_for_results
from tests.support.broker import Broker
from tests.support.process import Workers
from tests.support.scenario import wait_until_committed
from tests.support.topics import Kafka, Topics
from tests.support.waiting import holds_for, wait_for

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(900)]

OUTAGE_S = 60 if IS_LONG else 10
RESUME_S = 15 if IS_LONG else 60  # CI machines are slow, and this is no benchmark
GROWTH_BYTES = (
    100_000_000  # catching up fills the buffers for the first time; while the broker is away nothing may grow
)
GROWTH_AWAY_BYTES = 20_000_000


@pytest.mark.parametrize("delivery", ["at-least-once", "exactly-once"])
def test_a_long_outage_under_load(
    fragile_broker: Broker, topics: Topics, fragile_light: Workers, begin_feed: BeginFeed, delivery: str
) -> None:
    kafka = Kafka(fragile_broker.bootstrap)
    kafka.create_all(topics, 6)
    worker = fragile_light.start(topics, module=MODEL, delivery=delivery).wait_until_assigned(6)
    feed = begin_feed(kafka, topics, 1_000_000, 500)
    wait_for(lambda: kafka.count(topics.output) > 5_000, "5,000 results")
    before = resident_bytes(worker.pid)
    fragile_broker.stop()
    holds_for(lambda: worker.is_running and worker.status("/livez") == 200, "the worker is alive", OUTAGE_S, every=1)
    assert resident_bytes(worker.pid) < before + GROWTH_AWAY_BYTES
    fragile_broker.start()
    wait_for_results(kafka, topics, 1, RESUME_S)
    feed.stop()
    feed.finish()
    wait_until_committed(kafka, topics, 300)
    assert resident_bytes(worker.pid) < before + GROWTH_BYTES
    assert worker.terminate() == 0
    assert audited(kafka, topics).failures(delivery) == []


@pytest.mark.parametrize("delivery", ["at-least-once", "exactly-once"])
def test_a_producer_is_renewed_before_its_sequence_numbers_run_out(
    kafka: Kafka, topics: Topics, light: Workers, begin_feed: BeginFeed, delivery: str
) -> None:
    """aiokafka's wrap wrongly. Here they may run to 10,000 alone, which is still more than any transaction holds."""
    kafka.create_all(topics, 1)
    variables = {"RECORDS_PER_PRODUCER": "10000"}
    worker = light.start(topics, variables, module=MODEL, delivery=delivery, log_level="debug").wait_until_ready()
    feed = begin_feed(kafka, topics, 40_000, 2_000)
    feed.finish()
    wait_until_committed(kafka, topics, 300)
    assert worker.terminate() == 0
    # Four producers or more; the last one's line is left out of the log where it comes soon after another.
    assert len(worker.lines("The Kafka producer has closed")) >= 40_000 // 10_000 - 1
    assert audited(kafka, topics).failures("exactly-once") == []
