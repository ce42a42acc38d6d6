"""What a source with an end does: where it stops, what it commits, and when it says that all is done."""

import asyncio
from typing import Any

import pytest
from aiokafka.structs import OffsetAndMetadata, TopicPartition

from tests.support.source import ID, OTHER, TP, FakeConsumer, staged, until
from worker.core.topic_ids import with_topic_id
from worker.errors import WrongSetting
from worker.kafka import bounded_run
from worker.kafka.bounded_run import Until

END = 1_000
BEFORE, AT_THE_END = END - 1, END


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_run, "FINISHED_INTERVAL_S", 0.01)


@pytest.fixture
def new_group(consumer: FakeConsumer) -> FakeConsumer:
    """Of a topic with records from 500 on to 510."""
    consumer.committed_at, consumer.committed_metadata = None, ""
    consumer.last_offset, consumer.timestamp = 510, BEFORE
    return consumer


def metadata(end: int, time_ms: int = END) -> str:
    return with_topic_id(ID, f"until={time_ms};end={end}")


async def test_the_bound_is_committed_before_anything_is_read(new_group: FakeConsumer) -> None:
    new_group.commit_may_end.clear()
    stage = await staged(new_group, until=Until("g", END))
    await stage.assign(TP)
    await asyncio.sleep(0.05)
    assert stage.source.records_held() == 0
    new_group.commit_may_end.set()
    assert len((await stage.take())[0][1]) == 10
    assert (new_group.commits, new_group.commit_metadata) == ([{TP: 500}], {metadata(510)})


async def test_what_comes_after_the_bound_was_found_is_not_read(new_group: FakeConsumer) -> None:
    stage = await staged(new_group, until=Until("g", END))
    await stage.assign(TP)
    chunks = await stage.take()
    new_group.last_offset = 520
    stage.acknowledge(chunks)
    await until(lambda: TP in new_group.paused)
    assert stage.source.records_held() == 0
    assert stage.source._assignments[TP].is_finished()


async def test_a_record_of_the_end_is_where_it_stops(new_group: FakeConsumer) -> None:
    """Also where a commit of the last record before it stands already, which knew nothing of it."""
    stage = await staged(new_group, until=Until("g", END))
    new_group.last_offset = 505
    new_group.ends_at = 600
    await stage.assign(TP)
    stage.acknowledge(await stage.take())
    await until(lambda: {TP: 505} in new_group.commits)
    assert metadata(505) not in new_group.commit_metadata
    new_group.last_offset, new_group.timestamp = 600, AT_THE_END
    await until(lambda: metadata(505) in new_group.commit_metadata)
    assert new_group.commits[-1] == {TP: 505}
    assert stage.source.records_held() == 0


async def test_a_commit_under_way_does_not_stand_in_for_that_of_the_bound(new_group: FakeConsumer) -> None:
    """It is of the same offset, and names the bound that was known when it was sent."""
    stage = await staged(new_group, until=Until("g", END))
    new_group.last_offset, new_group.ends_at = 505, 600
    await stage.assign(TP)
    chunks = await stage.take()
    assignment = stage.source._assignments[TP]
    new_group.commit_may_end.clear()
    begun = new_group.commits_begun
    stage.acknowledge(chunks)
    await until(lambda: new_group.commits_begun > begun)
    new_group.last_offset, new_group.timestamp = 600, AT_THE_END
    await until(lambda: assignment.bound is not None and assignment.bound.offset == 505)
    await asyncio.sleep(0.05)
    new_group.commit_may_end.set()
    await until(lambda: metadata(505) in new_group.commit_metadata)
    await until(assignment.is_finished)


async def test_what_comes_after_the_bound_is_neither_lag_nor_committed(new_group: FakeConsumer) -> None:
    stage = await staged(new_group, until=Until("g", END))
    new_group.last_offset, new_group.timestamp = 600, AT_THE_END
    await stage.assign(TP)
    await until(lambda: TP in new_group.paused)
    assignment = stage.source._assignments[TP]
    assert new_group.positions[TP] > 500
    await stage.source._lag.measure(assignment, 600)
    assert stage.metrics.lag_records.labels("t", 0)._value.get() == 0
    assert assignment.acknowledged == 500


async def test_markers_before_the_bound_are_passed(new_group: FakeConsumer) -> None:
    stage = await staged(new_group, until=Until("g", END))
    await stage.assign(TP)
    chunks = await stage.take()
    new_group.positions[TP] = 513  # as of a reader that met records, markers and what came later
    stage.acknowledge(chunks)
    await until(lambda: {TP: 510} in new_group.commits)


async def test_a_partition_that_is_finished_is_not_read(consumer: FakeConsumer) -> None:
    consumer.committed_at, consumer.committed_metadata, consumer.timestamp = 510, metadata(510), BEFORE
    run = Until("g", END)
    stage = await staged(consumer, until=run)
    await stage.assign(TP)
    await until(run.finished.is_set)
    assert stage.source.records_held() == 0
    assert consumer.commits == []


async def test_it_is_done_once_all_partitions_of_the_group_are(consumer: FakeConsumer) -> None:
    consumer.committed_at, consumer.committed_metadata = 510, metadata(510)
    consumer.partitions = {0, 1}
    others = {OTHER: OffsetAndMetadata(509, metadata(510))}
    answers = consumer.committed_offsets

    async def committed(tps: Any, **options: Any) -> Any:
        return await answers(tps, **options) | {tp: others[tp] for tp in tps if tp in others}

    consumer.committed_offsets = committed  # type: ignore[method-assign]
    run = Until("g", END)
    stage = await staged(consumer, until=run)
    await stage.assign(TP)
    for commit in (others[OTHER], OffsetAndMetadata(-1, ""), OffsetAndMetadata(510, metadata(510).replace("a", "b"))):
        others[OTHER] = commit
        await asyncio.sleep(0.05)
        assert not run.finished.is_set(), commit
    others[OTHER] = OffsetAndMetadata(510, metadata(510))
    await until(run.finished.is_set)


@pytest.mark.parametrize(
    ("commit", "says"),
    [
        (OffsetAndMetadata(510, metadata(510, END + 1)), "a run until 1970-01-01T00:00:01.001Z"),
        (OffsetAndMetadata(510, metadata(510, END - 1)), "a run until 1970-01-01T00:00:00.999Z"),
        (OffsetAndMetadata(510, with_topic_id(ID)), "no other worker uses"),
    ],
)
async def test_a_member_of_another_run_that_came_meanwhile_is_no_success(
    consumer: FakeConsumer, commit: OffsetAndMetadata, says: str
) -> None:
    """Two that start at once find no commits of each other before they join."""
    consumer.committed_at, consumer.committed_metadata = 510, metadata(510)
    consumer.partitions = {0, 1}
    answers = consumer.committed_offsets

    async def committed(tps: Any, **options: Any) -> Any:
        return await answers(tps, **options) | {tp: commit for tp in tps if tp == OTHER}

    consumer.committed_offsets = committed  # type: ignore[method-assign]
    run = Until("g", END)
    stage = await staged(consumer, until=run)
    await stage.assign(TP)
    with pytest.raises(WrongSetting, match=says):
        await asyncio.wait_for(stage.run, 30)
    assert not run.finished.is_set()


async def test_a_partition_that_another_worker_has_read_is_refused(consumer: FakeConsumer) -> None:
    stage = await staged(consumer, until=Until("g", END))
    await stage.assign(TP)
    with pytest.raises(WrongSetting, match="no other worker uses"):
        await asyncio.wait_for(stage.run, 30)
    assert consumer.commits == []


async def test_it_is_not_done_while_there_are_partitions_it_has_not_known(consumer: FakeConsumer) -> None:
    consumer.committed_at, consumer.committed_metadata = 510, metadata(510)
    others: dict[Any, OffsetAndMetadata] = {OTHER: OffsetAndMetadata(-1, "")}
    answers = consumer.committed_offsets

    async def committed(tps: Any, **options: Any) -> Any:
        return await answers(tps, **options) | {tp: others[tp] for tp in tps if tp in others}

    consumer.committed_offsets = committed  # type: ignore[method-assign]
    consumer.partitions_after_refresh = {0, 1}
    run = Until("g", END)
    stage = await staged(consumer, until=run)
    await stage.assign(TP)
    await until(lambda: consumer.partitions == {0, 1})
    await asyncio.sleep(0.05)
    assert not run.finished.is_set()
    others[OTHER] = OffsetAndMetadata(510, metadata(510))
    await until(run.finished.is_set)


async def test_it_is_not_done_while_a_new_topic_matches(consumer: FakeConsumer) -> None:
    consumer.committed_at, consumer.committed_metadata = 510, metadata(510)
    consumer.names = ["t", "t2", "other"]
    run = Until("g", END)
    stage = await staged(consumer, until=run, pattern="t.*")
    await stage.assign(TP)
    await asyncio.sleep(0.05)
    assert not run.finished.is_set()
    consumer.names = ["t", "other"]
    await until(run.finished.is_set)


async def test_it_is_not_done_where_a_topic_was_subscribed_to_while_it_asked_for_commits(
    consumer: FakeConsumer,
) -> None:
    """The new topic's commits are then not among those that it asked for."""
    consumer.committed_at, consumer.committed_metadata = 510, metadata(510)
    consumer.names = ["t", "t2"]
    run = Until("g", END)
    stage = await staged(consumer, until=run, pattern="t.*")
    new = TopicPartition("t2", 0)
    others = {new: OffsetAndMetadata(-1, "")}
    answers = consumer.committed_offsets
    rounds = 0

    async def committed(tps: Any, **options: Any) -> Any:
        nonlocal rounds
        rounds += 1
        answered = await answers(tps, **options) | {tp: others[tp] for tp in tps if tp in others}
        stage.source._subscription.topics = ("t", "t2")
        return answered

    await stage.assign(TP)
    await until(stage.source._assignments[TP].is_finished)
    consumer.committed_offsets = committed  # type: ignore[method-assign]
    await until(lambda: rounds >= 5)
    assert not run.finished.is_set()
    others[new] = OffsetAndMetadata(510, metadata(510))
    await until(run.finished.is_set)


async def test_now_is_what_the_reader_of_the_first_partition_says(new_group: FakeConsumer) -> None:
    new_group.partitions = {0, 1}
    run = Until("g", None, clock=lambda: END / 1000)
    stage = await staged(new_group, until=run)
    await stage.assign(OTHER)
    await asyncio.sleep(0.3)
    assert new_group.commits == []
    new_group.committed_at, new_group.committed_metadata = 3, metadata(9, 77)
    await until(lambda: run.time_ms == 77)

    new_group.committed_at, new_group.committed_metadata, run.time_ms = None, "", None
    await stage.assign(TP)
    await until(lambda: metadata(510) in new_group.commit_metadata)
    assert run.time_ms is None, "another may say it until this is committed"


@pytest.mark.parametrize(
    ("commit", "says"),
    [
        (OffsetAndMetadata(3, ""), "no other worker uses"),
        (OffsetAndMetadata(3, with_topic_id(ID)), "no other worker uses"),
        (OffsetAndMetadata(3, metadata(5, 2)), "a run until 1970-01-01T00:00:00.002Z"),
    ],
)
def test_a_group_of_others_is_refused(commit: OffsetAndMetadata, says: str) -> None:
    with pytest.raises(WrongSetting, match=says):
        Until("g", END).check([OffsetAndMetadata(-1, ""), commit])


def test_now_takes_the_time_that_the_group_has() -> None:
    run = Until("g", None)
    run.check([OffsetAndMetadata(-1, ""), OffsetAndMetadata(0, metadata(5, 2))])
    assert run.time_ms == 2
    run.check([OffsetAndMetadata(0, metadata(5, 3))])  # as where two members know different first topics of a pattern
    assert run.time_ms == 2


@pytest.mark.parametrize(("found", "begin"), [(505, 505), (None, 510)])
async def test_since_is_where_a_group_begins(new_group: FakeConsumer, found: int | None, begin: int) -> None:
    new_group.first_of_time = found
    stage = await staged(new_group, since_ms=BEFORE)
    await stage.assign(TP)
    await until(lambda: new_group.commits == [{TP: begin}])


async def test_since_moves_no_committed_offset(consumer: FakeConsumer) -> None:
    consumer.committed_at, consumer.first_of_time = 7, 505
    stage = await staged(consumer, since_ms=BEFORE)
    await stage.assign(TP)
    assert (await stage.take())[0][1][0].offset == 7
