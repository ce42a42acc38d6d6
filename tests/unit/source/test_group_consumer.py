"""The consumer that is started, and its timeouts."""

import pytest

from tests.support.source import at_least_once, served
from worker.kafka.connection import Connection
from worker.kafka.consumer import Consumer
from worker.telemetry.health import Health
from worker.telemetry.metrics import Metrics


async def test_it_reads_with_the_consumer_that_knows_what_is_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def start(_: Consumer) -> None: ...

    monkeypatch.setattr(Consumer, "start", start)
    metrics, health = Metrics("test"), Health()
    source = served(at_least_once(metrics, health), metrics=metrics, health=health)
    consumer = await source._consumer._started()
    await consumer.stop()
    assert type(consumer) is Consumer


@pytest.mark.parametrize("request_timeout_ms", [1_000, 5_000, 30_000, 300_000])
@pytest.mark.parametrize("session_timeout_ms", [1_000, 45_000])
def test_what_a_rebalance_takes_fits_into_its_time(request_timeout_ms: int, session_timeout_ms: int) -> None:
    """To hear of it, to give up what one has, and to join again, in a request that waits for all members."""
    connection = Connection(("x:1",), request_timeout_ms=request_timeout_ms)
    metrics, health = Metrics("test"), Health()
    source = served(
        at_least_once(metrics, health),
        connection,
        metrics=metrics,
        health=health,
        session_timeout_ms=session_timeout_ms,
    )
    timeouts = source._consumer._timeouts
    rebalance_s = timeouts.rebalance_ms / 1000
    assert timeouts.heartbeat_ms / 1000 + timeouts.revoke_s < rebalance_s < connection.request_timeout_s
    assert timeouts.heartbeat_ms * 3 <= session_timeout_ms
    assert request_timeout_ms != 30_000 or rebalance_s == 12, "which the documents name"
