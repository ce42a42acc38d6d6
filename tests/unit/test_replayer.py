"""A replay at the edges that no broker brings about."""

import asyncio
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import IllegalStateError
from aiokafka.structs import OffsetAndMetadata

from worker.core.dead_letters import OriginalRecord
from worker.core.decoder import Decoder
from worker.core.replay_progress import PartitionReplay, ReplayProgress
from worker.core.topic_ids import with_topic_id
from worker.kafka.aiokafka_compat.connections import SILENT_BROKERS_S
from worker.kafka.connection import Connection
from worker.kafka.replayer import SILENCE_S, Replayer, ReplayFailed
from worker.kafka.sink import Sink
from worker.telemetry.health import Health
from worker.telemetry.metrics import Metrics

LETTER = OriginalRecord("gone", 0, 7, 0, b"k", b"{", [], "invalid_json", True)


def replayer() -> Replayer:
    connection, health = Connection(("localhost:9092",)), Health()
    return Replayer(
        connection,
        Sink(connection, limits={}, metrics=Metrics(""), health=health),
        health,
        topic="dead",
        group_id="replay",
        reasons=(),
        since_ms=None,
        until_ms=None,
        is_dry=False,
        decoder=Decoder(),
        stop=asyncio.Event(),
        tell=lambda done, total: None,
    )


async def test_a_signal_ends_the_wait_for_a_topic_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = asyncio.Event()

    async def for_ever(*_: Any, **__: Any) -> None:
        waiting.set()
        await asyncio.Event().wait()

    monkeypatch.setattr("worker.kafka.replayer.wait_until_usable", for_ever)
    replay = replayer()
    sending = asyncio.create_task(replay._send([LETTER]))
    await asyncio.wait_for(waiting.wait(), 30)
    replay._stop.set()
    with pytest.raises(ReplayFailed, match="before gone could be used"):
        await asyncio.wait_for(sending, 30)


async def test_a_signal_ends_the_wait_for_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    replay, waiting = replayer(), asyncio.Event()

    async def nothing(*_: Any) -> None: ...

    async def for_ever() -> None:
        waiting.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(replay, "_wait_until_usable", nothing)
    monkeypatch.setattr(replay, "_start", for_ever)
    running = asyncio.create_task(replay.run())
    await asyncio.wait_for(waiting.wait(), 30)
    replay._stop.set()
    with pytest.raises(ReplayFailed, match="stopped before it had begun"):
        await asyncio.wait_for(running, 30)


@pytest.mark.parametrize("is_stopped", [True, False])
@pytest.mark.parametrize("what", ["publish", "commit"])
async def test_what_brokers_refuse_ends_the_replay_at_a_signal_and_after_a_time(
    monkeypatch: pytest.MonkeyPatch, what: str, is_stopped: bool
) -> None:
    replay = replayer()
    monkeypatch.setattr("worker.kafka.replayer.LOOK_S", 0.001)
    if is_stopped:
        monkeypatch.setattr("worker.kafka.replayer.STOP_S", 0.05)
        replay._stop.set()
    else:
        replay._patience_s = 0.05
    sent: list[Any] = []

    async def refused(_: Any) -> Any:
        replay._health.failing(what, f"cannot {what}: missing WRITE on topic gone; add the ACL")
        await asyncio.Event().wait()

    async def published(records: list[Any]) -> list[None]:
        sent.extend(records)
        return [None for _ in records]

    monkeypatch.setattr(replay, "_select", lambda *_: ([LETTER], []))
    monkeypatch.setattr(replay._sink, "publish", refused if what == "publish" else published)
    monkeypatch.setattr(replay._consumer, "commit", refused)
    replay._usable_topics.add(LETTER.topic)
    partition = PartitionReplay(ReplayProgress(3), 3, 5)
    with pytest.raises(
        ReplayFailed, match=f"^{what}: cannot {what}: missing WRITE on topic gone; add the ACL; the next"
    ):
        await asyncio.wait_for(replay._finish(TopicPartition("dead", 0), partition, [], 5), 30)
    assert partition.next == 3, "none of it counts as replayed"
    assert len(sent) == (what == "commit")


async def test_records_that_are_being_published_are_waited_for_at_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.kafka.replayer.LOOK_S", 0.001)
    monkeypatch.setattr("worker.kafka.replayer.STOP_S", 0)
    replay, acknowledged = replayer(), asyncio.Event()
    replay._stop.set()
    looks = 0

    def why_not_ready() -> None:
        nonlocal looks
        looks += 1
        if looks == 20:
            acknowledged.set()

    monkeypatch.setattr(replay._health, "why_not_ready", why_not_ready)
    assert await asyncio.wait_for(replay._unless_failing(acknowledged.wait()), 30)


async def test_a_partition_that_is_revoked_as_it_is_begun_is_begun_when_it_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replay = replayer()
    tp = TopicPartition("dead", 0)
    partition = replay._partitions[tp] = PartitionReplay(ReplayProgress(3), 3, 5)
    sought: list[int] = []
    assigned: set[TopicPartition] = set()

    def seek(_: TopicPartition, offset: int) -> None:
        if tp not in assigned:
            raise IllegalStateError("no partition of this consumer's")
        sought.append(offset)

    async def read(*_: Any) -> tuple[list[Any], int]:
        return [], 5

    async def finish(*_: Any) -> None:
        partition.next = 5

    async def group_error(*_: Any) -> None: ...

    monkeypatch.setattr(replay._consumer, "raise_group_error", group_error)
    monkeypatch.setattr(replay._consumer, "seek", seek)
    monkeypatch.setattr(replay, "_read", read)
    monkeypatch.setattr(replay, "_finish", finish)
    going = asyncio.create_task(replay._replay_partition(tp, partition))
    await asyncio.sleep(0)
    assert not going.done()
    assigned.add(tp)
    await replay.on_partitions_assigned(assigned)
    await asyncio.wait_for(going, 30)
    assert sought == [3]


ID, OTHER_ID = "aaaaaaaaaaaaaaaaaaaaaa", "bbbbbbbbbbbbbbbbbbbbbb"


@pytest.mark.parametrize(
    ("answers", "offset"),
    [([ID], 7), ([OTHER_ID, OTHER_ID], 0), ([None], None), ([OTHER_ID, None], None), ([OTHER_ID, ID], None)],
)
async def test_what_was_done_is_done_again_only_where_the_brokers_agree_that_the_topic_is_another(
    monkeypatch: pytest.MonkeyPatch, answers: list[str | None], offset: int | None
) -> None:
    monkeypatch.setattr("worker.kafka.replayer.TOPIC_IDS_DOUBT_S", 0)
    replay = replayer()
    tp = TopicPartition("dead", 0)

    async def agreed_topic_id(_: str) -> str | None:
        return answers.pop(0)

    async def committed_offsets(_: Any) -> dict[TopicPartition, OffsetAndMetadata]:
        return {tp: OffsetAndMetadata(7, with_topic_id(ID))}

    async def progress() -> dict[TopicPartition, ReplayProgress]:
        replay._topic_id = await replay._agreed_id()
        return await replay._progress([tp])

    monkeypatch.setattr(replay._consumer, "agreed_topic_id", agreed_topic_id)
    monkeypatch.setattr(replay._consumer, "committed_offsets", committed_offsets)
    if offset is None:
        with pytest.raises(ReplayFailed, match="do not agree on which topic"):
            await progress()
    else:
        assert (await progress())[tp].offset == offset
    assert answers == []


def test_it_outlasts_the_search_for_brokers_under_other_addresses() -> None:
    assert SILENCE_S >= 2 * SILENT_BROKERS_S
