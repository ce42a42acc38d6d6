"""Sessions of the source, how they end, and what a drain leaves uncommitted."""

import asyncio

import pytest
from aiokafka.errors import (
    CommitFailedError,
    KafkaError,
)

from tests.support.source import (
    TP,
    FakeConsumer,
    staged,
    until,
)
from worker.errors import WrongSetting


async def test_a_fault_during_a_revocation_keeps_its_name(consumer: FakeConsumer) -> None:
    stage = await staged(consumer)
    await stage.assign(TP)
    chunks = await stage.take()
    revoking = asyncio.create_task(stage.revoke(TP))
    await until(lambda: not chunks[0][0].accepts)
    stage.source._fail(WrongSetting("no"))
    await asyncio.sleep(0.01)
    stage.acknowledge(chunks)
    await asyncio.wait({revoking, stage.run}, timeout=30)
    with pytest.raises(WrongSetting, match="no"):
        stage.run.result()
    assert consumer.commits == [{TP: chunks[0][1][-1].offset + 1}]


async def test_an_error_in_a_rebalance_ends_the_session(
    consumer: FakeConsumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """aiokafka would log it, and go on without the revocation."""
    stage = await staged(consumer)
    await stage.assign(TP)

    def fail(*_: object) -> None:
        raise LookupError("broken")

    monkeypatch.setattr(stage.metrics, "forget_partition", fail)
    await stage.revoke(TP)
    await asyncio.wait({stage.run}, timeout=30)
    assert isinstance(stage.run.exception(), LookupError)


async def test_commits_that_fail_do_not_keep_a_session_from_ending(consumer: FakeConsumer) -> None:
    consumer.commit_error = CommitFailedError("rebalancing")
    stage = await staged(consumer)
    await stage.assign(TP)
    for _ in range(20):
        stage.acknowledge(await stage.take())
        await asyncio.sleep(0)
    stage.source._fail(WrongSetting("twin"))
    await asyncio.wait({stage.run}, timeout=30)
    assert isinstance(stage.run.exception(), WrongSetting)


async def test_what_cannot_be_committed_at_the_end_is_told(consumer: FakeConsumer) -> None:
    consumer.commit_may_end.clear()
    stage = await staged(consumer)
    await stage.assign(TP)
    stage.acknowledge(await stage.take())
    assert await stage.source.close(0.2) > 0


async def test_everything_committed_at_the_end_leaves_nothing(consumer: FakeConsumer) -> None:
    stage = await staged(consumer)
    await stage.assign(TP)
    stage.acknowledge(await stage.take())
    assert await stage.source.close(1) == 0


async def test_a_stop_that_is_cancelled_inside_of_the_client_is_a_stop(consumer: FakeConsumer) -> None:
    consumer.stop_error = asyncio.CancelledError()
    stage = await staged(consumer)
    await stage.assign(TP)
    await stage.source.close(1)
    await asyncio.wait({stage.run}, timeout=30)
    assert stage.run.exception() is None


async def test_what_is_held_is_what_waits_and_what_is_under_way(consumer: FakeConsumer) -> None:
    stage = await staged(consumer)
    assert stage.source.records_held() == 0
    await stage.assign(TP)
    chunks = await stage.take()
    consumer.reading.clear()
    held, under_way = stage.source.records_held(), sum(len(records) for _, records in chunks)
    assert held == under_way + len(stage.source._read_ahead)
    stage.acknowledge(chunks)
    assert stage.source.records_held() == held - under_way
    await stage.revoke(TP)
    assert stage.source.records_held() == 0


@pytest.mark.parametrize("is_late", [False, True])
async def test_what_a_rebalance_during_the_drain_leaves_uncommitted_is_told(
    consumer: FakeConsumer, is_late: bool
) -> None:
    """Whether it was published before the partition went, or after: the next owner publishes it again."""
    consumer.commit_error = CommitFailedError("thrown out of the group")
    stage = await staged(consumer)
    await stage.assign(TP)
    chunks = await stage.take()
    stage.source.stop_taking()
    if is_late:
        stage.source._rebalances._revoke_timeout_s = 0
        await stage.revoke(TP)
        stage.acknowledge(chunks)
    else:
        stage.acknowledge(chunks)
        await stage.revoke(TP)
    records = sum(len(records) for _, records in chunks)
    assert stage.metrics.duplicates_possible._value.get() == records
    assert await stage.source.close(1) == records


@pytest.mark.parametrize("is_dropped", [True, False])
async def test_what_was_taken_and_went_no_further_in_a_drain_is_told(consumer: FakeConsumer, is_dropped: bool) -> None:
    """Whether it was dropped, as with a transaction that is lost, or is still nowhere when the drain has ended."""
    stage = await staged(consumer)
    await stage.assign(TP)
    ((assignment, records),) = await stage.take()
    stage.source.stop_taking()
    if is_dropped:
        stage.source.drop(assignment, len(records))
    assert await stage.source.close(1) == len(records)


async def test_what_was_left_uncommitted_before_the_drain_is_no_failure_of_it(consumer: FakeConsumer) -> None:
    consumer.commit_error = CommitFailedError("thrown out of the group")
    stage = await staged(consumer)
    await stage.assign(TP)
    stage.acknowledge(await stage.take())
    await stage.revoke(TP)
    consumer.commit_error = None
    assert await stage.source.close(1) == 0


@pytest.mark.parametrize("how", ["revoked", "begun again"])
async def test_what_is_dropped_of_an_assignment_that_ended_before_the_drain_is_no_failure_of_it(
    consumer: FakeConsumer, how: str
) -> None:
    """A zombie has such records in its pipeline: others read them."""
    stage = await staged(consumer)
    stage.source._rebalances._revoke_timeout_s = 0
    await stage.assign(TP)
    ((assignment, records),) = await stage.take()
    if how == "revoked":
        await stage.revoke(TP)
    else:
        stage.source.restart(assignment)
    stage.source.stop_taking()
    stage.source.drop(assignment, len(records))
    assert await stage.source.close(1) == 0


async def test_what_the_group_refuses_in_a_drain_is_no_failure_of_it(consumer: FakeConsumer) -> None:
    stage = await staged(consumer)
    await stage.assign(TP)
    ((assignment, records),) = await stage.take()
    stage.source.stop_taking()
    assignment.is_lost = True
    stage.source.drop(assignment, len(records))
    assert await stage.source.close(1) == 0


async def test_no_reader_outlives_the_end_of_taking(consumer: FakeConsumer) -> None:
    """Not even one that misses being cancelled, as asyncio's waiting can."""
    stage = await staged(consumer)
    consumer.reading.clear()
    await stage.assign(TP)
    reader = stage.source._rebalances._readers[stage.source._assignments[TP]]
    await until(lambda: consumer.reads_begun)
    consumer.swallows_cancel = True
    stage.source.stop_taking()
    consumer.reading.set()
    await until(reader.done)
    assert len(stage.source._read_ahead) == 0


@pytest.mark.parametrize("end", ["drain", "revocation"])
async def test_records_that_come_when_none_are_accepted_are_not_committed(consumer: FakeConsumer, end: str) -> None:
    """A read that misses being cancelled has moved the position past records that nobody takes."""
    stage = await staged(consumer)
    consumer.reading.clear()
    await stage.assign(TP)
    assignment = stage.source._assignments[TP]
    reader = stage.source._rebalances._readers[assignment]
    await until(lambda: consumer.reads_begun)
    consumer.swallows_cancel = True
    if end == "drain":
        stage.source.stop_taking()
    else:
        assignment.under_way = 1  # so that the revocation waits
        revoking = asyncio.create_task(stage.revoke(TP))
    await until(reader.done)
    assert consumer.positions[TP] > 0
    await stage.source._lag.measure(assignment, consumer.last_offset)
    if end == "revocation":
        stage.source.drop(assignment, 1)
        await revoking
    await stage.source.close(1)
    assert consumer.commits == []


async def test_what_the_consumers_own_tasks_end_by_is_told_by_kind_and_place(
    consumer: FakeConsumer, caplog: pytest.LogCaptureFixture
) -> None:
    stage = await staged(consumer)
    try:
        {}["a text"]
    except KeyError as error:
        cause = KafkaError("Unexpected error during data retrieval")
        cause.__cause__ = error
    consumer.fetching.set_exception(cause)
    await until(lambda: "the consumer's fetch task has ended: KeyError at test_source.py:" in caplog.text)
    assert "a text" not in caplog.text
    assert "joining the group again" in (stage.health.why_not_ready() or "")
