"""Which topic an input topic's name stands for."""

import asyncio
from typing import Any

import pytest
from aiokafka import TopicPartition

from tests.support.source import (
    ID,
    OTHER,
    OTHER_ID,
    TP,
    FakeConsumer,
    staged,
    until,
)
from worker.core.topic_ids import TopicRecreated, with_topic_id
from worker.kafka import topic_identity


@pytest.mark.parametrize("metadata", ["", "of an older version", with_topic_id(ID)])
async def test_an_offset_of_this_topic_or_without_an_id_is_where_to_begin(
    consumer: FakeConsumer, metadata: str
) -> None:
    consumer.committed_at, consumer.committed_metadata, consumer.last_offset = 30, metadata, 40
    stage = await staged(consumer)
    await stage.assign(TP)
    stage.acknowledge(await stage.take())
    await until(lambda: {TP: 40} in consumer.commits)
    assert consumer.commit_metadata == {with_topic_id(ID)}
    assert stage.metrics.offset_resets._value.get() == 0


@pytest.mark.parametrize("metadata", ["", "of an older version"])
async def test_an_offset_without_an_id_gets_one_at_once(consumer: FakeConsumer, metadata: str) -> None:
    """A partition may be idle until its topic is created again, and then the old offset would hold in the new one."""
    consumer.committed_at, consumer.committed_metadata, consumer.last_offset = 30, metadata, 30
    await (await staged(consumer)).assign(TP)
    await until(lambda: consumer.commits)
    assert (consumer.commits, consumer.commit_metadata) == ([{TP: 30}], {with_topic_id(ID)})


async def test_an_offset_with_its_id_is_not_committed_again(consumer: FakeConsumer) -> None:
    consumer.committed_at, consumer.last_offset = 30, 30
    await (await staged(consumer)).assign(TP)
    await until(lambda: TP in consumer.positions)
    await asyncio.sleep(0.1)
    assert consumer.commits == []


@pytest.mark.parametrize(("reset", "offset"), [("earliest", 500), ("latest", 10**6)])
async def test_an_offset_of_another_topic_counts_as_none(
    consumer: FakeConsumer, reset: str, offset: int, caplog: pytest.LogCaptureFixture
) -> None:
    consumer.committed_at, consumer.committed_metadata = 30, with_topic_id(OTHER_ID)
    stage = await staged(consumer, auto_offset_reset=reset)
    await stage.assign(TP)
    await until(lambda: consumer.commits)
    assert consumer.commits[0] == {TP: offset}, "committed at once: the next start must not count it again"
    assert consumer.commit_metadata == {with_topic_id(ID)}
    assert stage.metrics.offset_resets._value.get() == 1
    assert ("skips" in caplog.text) == (reset == "latest")
    assert "deleted and created again" in caplog.text


@pytest.mark.parametrize("reset", ["earliest", "latest"])
async def test_a_broker_that_is_behind_the_others_makes_no_offset_count_as_none(
    consumer: FakeConsumer, reset: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It knows the topic that was there before, and says so as often as it is asked. The others do not agree."""
    consumer.committed_at, consumer.committed_metadata = 30, with_topic_id(OTHER_ID)
    consumer.agreed = [None] * 100
    stage = await staged(consumer, auto_offset_reset=reset)
    await stage.assign(TP)
    reason = "read: the brokers do not agree on which topic has the name t"
    await until(lambda: stage.health.why_not_ready() == reason)
    await asyncio.sleep(0.1)
    assert (consumer.positions, consumer.commits) == ({}, [])
    consumer.agreed, consumer.topic_id = [], OTHER_ID  # it is no longer behind
    with pytest.raises(TopicRecreated):
        await asyncio.wait_for(stage.run, 30)
    assert (consumer.positions, consumer.commits) == ({}, [])
    assert "counts as none" not in caplog.text


async def test_brokers_that_agree_again_end_the_doubt(consumer: FakeConsumer) -> None:
    consumer.committed_at, consumer.committed_metadata = 30, with_topic_id(OTHER_ID)
    consumer.agreed, consumer.last_offset = [None, OTHER_ID, None, ID], 500
    stage = await staged(consumer)
    await stage.assign(TP, OTHER)
    await until(lambda: consumer.positions.keys() == {TP, OTHER})
    assert stage.metrics.offset_resets._value.get() == 2
    await until(lambda: stage.health.why_not_ready() is None)


async def test_partitions_that_wait_for_one_topic_share_what_is_asked(
    consumer: FakeConsumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    async def counted(_: str) -> str:
        nonlocal asked
        asked += 1
        return ID

    monkeypatch.setattr(consumer, "agreed_topic_id", counted)
    consumer.committed_metadata = with_topic_id(OTHER_ID)
    stage = await staged(consumer)
    tps = [TopicPartition("t", number) for number in range(50)]
    await stage.assign(*tps)
    await until(lambda: len(consumer.positions) == len(tps))
    assert asked <= 2


async def test_brokers_without_ids_change_nothing(consumer: FakeConsumer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def none(topics: Any) -> dict[str, str]:
        return dict.fromkeys(topics, "")

    monkeypatch.setattr(consumer, "topic_ids", none)
    consumer.committed_at, consumer.committed_metadata, consumer.last_offset = 30, with_topic_id(OTHER_ID), 40
    stage = await staged(consumer)
    await stage.assign(TP)
    stage.acknowledge(await stage.take())
    await until(lambda: consumer.commits)
    assert (consumer.commits, consumer.commit_metadata) == ([{TP: 40}], {""})


async def test_a_topic_that_is_unknown_for_a_moment_is_waited_for(consumer: FakeConsumer) -> None:
    consumer.topic_id, consumer.committed_at = "", 30
    stage = await staged(consumer)
    await stage.assign(TP)
    await asyncio.sleep(0.05)
    assert not stage.run.done()
    assert consumer.positions == {}
    consumer.topic_id = ID
    assert (await stage.take())[0][1][0].offset == 30


async def test_a_topic_that_is_made_anew_while_it_is_read_ends_the_session(
    consumer: FakeConsumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topic_identity, "TOPIC_IDS_INTERVAL_S", 0.01)
    stage = await staged(consumer)
    await stage.assign(TP)
    chunks = await stage.take()
    consumer.topic_id = ""
    await asyncio.sleep(0.05)
    assert not stage.run.done(), "gone for a moment is no verdict"
    consumer.topic_id = OTHER_ID
    await asyncio.sleep(0.05)
    stage.acknowledge(chunks)
    with pytest.raises(TopicRecreated, match=f"the input topic t was deleted and created again.*{ID}.*{OTHER_ID}"):
        await asyncio.wait_for(stage.run, 30)
    assert consumer.commit_metadata == {with_topic_id(ID)}, "what is committed of the old one never names the new one"


async def test_a_topic_that_was_made_anew_before_a_rebalance_is_not_read_at_all(consumer: FakeConsumer) -> None:
    stage = await staged(consumer)
    await stage.assign(TP)
    stage.acknowledge(await stage.take())
    await stage.revoke(TP)
    consumer.topic_id, consumer.positions = OTHER_ID, {}
    await stage.assign(TP)
    with pytest.raises(TopicRecreated):
        await asyncio.wait_for(stage.run, 30)
    assert consumer.positions == {}


async def test_nothing_is_read_while_the_topic_is_in_doubt_which_is_told(
    consumer: FakeConsumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = await staged(consumer)
    await stage.assign(TP)
    await stage.take()

    async def none(topics: Any) -> dict[str, str]:
        return dict.fromkeys(topics, "")

    monkeypatch.setattr(consumer, "topic_ids", none)  # neither one nor the other
    stage.source._topic_identity._topic_ids.update({"t": OTHER_ID})
    reason = "read: the brokers do not agree on which topic has the name t"
    await until(lambda: stage.health.why_not_ready() == reason)
    await asyncio.sleep(0.05)
    position = consumer.positions[TP]
    while len(stage.source._read_ahead):
        await stage.take()
    await asyncio.sleep(0.05)
    assert consumer.positions[TP] == position
    monkeypatch.undo()
    await stage.take()
    await until(lambda: stage.health.why_not_ready() is None)


async def test_an_offset_that_is_gone_is_no_gap_where_the_topic_is_another(consumer: FakeConsumer) -> None:
    consumer.last_offset = 10
    stage = await staged(consumer)
    await stage.assign(TP)
    stage.acknowledge(await stage.take())
    consumer.topic_id = OTHER_ID
    stage.source._assignments[TP].is_out_of_range = True
    with pytest.raises(TopicRecreated):
        await asyncio.wait_for(stage.run, 30)
    assert stage.metrics.offset_resets._value.get() == 0
