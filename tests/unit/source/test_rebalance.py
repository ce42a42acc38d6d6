"""Assignments at the edges of a rebalance, with a consumer that answers exactly when the test says."""

import asyncio
import contextlib
from typing import Any

import pytest
from aiokafka.errors import (
    RequestTimedOutError,
)

from tests.support.source import (
    TP,
    FakeConsumer,
    FakeDelivery,
    staged,
    until,
)
from worker.runtime.tasks import cancel_all


@pytest.mark.parametrize("turns", range(5))
async def test_a_reader_does_not_outlive_its_revocation(consumer: FakeConsumer, turns: int) -> None:
    """Its next read would take the next assignment's records. The committed offset arrives just before the revocation."""
    consumer.committed_at, consumer.last_offset = 100, 120
    consumer.knows_committed.clear()
    consumer.reading.clear()
    stage = await staged(consumer)
    await stage.assign(TP)
    reader = stage.source._rebalances._readers[stage.source._assignments[TP]]
    await asyncio.sleep(0.01)
    consumer.knows_committed.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    await stage.revoke(TP)
    assert reader.done()
    await stage.assign(TP)
    consumer.reading.set()
    await until(lambda: len(stage.source._read_ahead) == 20)
    offsets = [record.offset for _, records in await stage.take() for record in records]
    assert offsets == list(range(100, 120))


async def test_troubles_with_partitions_end_with_the_last_one(consumer: FakeConsumer) -> None:
    consumer.commit_error = RequestTimedOutError()
    stage = await staged(consumer)
    await stage.assign(TP)
    stage.acknowledge(await stage.take())
    await until(lambda: "commit" in (stage.health.why_not_ready() or ""))
    await stage.revoke(TP)
    await stage.assign()
    assert stage.health.why_not_ready() is None


async def test_a_reader_that_does_not_end_ends_the_session(
    consumer: FakeConsumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would take records of the next assignment."""
    is_over, reads = asyncio.Event(), 0

    async def endless(*_: object, **__: object) -> Any:
        nonlocal reads
        reads += 1
        while not is_over.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await is_over.wait()
        return {}

    monkeypatch.setattr(cancel_all, "__defaults__", (0.05,))
    monkeypatch.setattr(consumer, "getmany", endless)
    stage = await staged(consumer)
    await stage.assign(TP)
    await until(lambda: reads)
    await stage.revoke(TP)
    await until(lambda: "a reader does not end" in (stage.health.why_not_ready() or ""))
    is_over.set()


async def test_no_partition_is_read_while_its_last_reader_does_not_end(
    consumer: FakeConsumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_over, reads = asyncio.Event(), 0

    async def endless(*_: object, **__: object) -> Any:
        nonlocal reads
        reads += 1
        while not is_over.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await is_over.wait()
        return {}

    monkeypatch.setattr(cancel_all, "__defaults__", (0.05,))
    monkeypatch.setattr(consumer, "getmany", endless)
    stage = await staged(consumer)
    await stage.assign(TP)
    await until(lambda: reads)
    stage.source.restart(stage.source._assignments[TP])
    await until(lambda: "a reader does not end" in (stage.health.why_not_ready() or ""))
    assert reads == 1
    is_over.set()


async def test_a_reader_that_others_cancel_is_noticed(consumer: FakeConsumer) -> None:
    stage = await staged(consumer)
    await stage.assign(TP)
    stage.acknowledge(await stage.take())
    stage.source._rebalances._readers[stage.source._assignments[TP]].cancel()
    await until(lambda: "a reader was cancelled" in (stage.health.why_not_ready() or ""))


async def test_a_partition_that_is_lost_while_it_is_revoked_is_given_up_as_a_whole(
    consumer: FakeConsumer, delivery: FakeDelivery
) -> None:
    """Its trouble, its lag and its count of partitions go with it; the revocation finds nothing to release any more."""
    stage = await staged(consumer, delivery=delivery)
    await stage.assign(TP)
    chunks = await stage.take()
    assignment = stage.source._assignments[TP]
    stage.metrics.lag("t", 0, 5, 1.0)
    revoking = asyncio.create_task(stage.revoke(TP))
    await until(lambda: not assignment.accepts)
    stage.source.restart(assignment)
    stage.source.drop(assignment, sum(len(records) for _, records in chunks))
    await revoking
    assert (delivery.released, delivery.abandoned) == ([assignment], [])
    assert stage.source._assignments == {}
    assert stage.metrics.lag_records._metrics == {}
    assert stage.metrics.assigned_partitions._value.get() == 0


async def test_a_partition_that_is_lost_while_it_is_ours_begins_anew(
    consumer: FakeConsumer, delivery: FakeDelivery
) -> None:
    consumer.committed_at = 30
    stage = await staged(consumer, delivery=delivery)
    await stage.assign(TP)
    await stage.take()
    assignment = stage.source._assignments[TP]
    stage.source.restart(assignment)
    assert (delivery.released, delivery.abandoned) == ([], [assignment])
    assert (await stage.take())[0][1][0].offset == 30
    assert stage.source._assignments[TP] is not assignment
