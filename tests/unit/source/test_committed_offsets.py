"""Committed offsets: asked for together, and waited for while an open transaction may change them."""

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import (
    GroupAuthorizationFailedError,
    KafkaConnectionError,
    KafkaError,
    TopicAuthorizationFailedError,
)
from aiokafka.structs import OffsetAndMetadata

from tests.support.source import until
from worker.errors import WrongSetting
from worker.kafka import committed_offsets as module
from worker.kafka.aiokafka_compat.offsets import StableOffsetFetchRequest, committed_offsets
from worker.kafka.aiokafka_compat.transactions import (
    Membership,
    MemberTxnOffsetCommitRequest,
    TxnOffsetCommitRequest_v0,
)
from worker.kafka.committed_offsets import CommittedOffsets
from worker.kafka.permissions import missing_permission
from worker.runtime.tasks import cancel_all
from worker.telemetry.health import Health

PARTITIONS = [TopicPartition("t", number) for number in range(1_000)]
TP = PARTITIONS[0]
COMMIT = OffsetAndMetadata(7, "topic_id=x")


class FakeGroupConsumer:
    """Its committed offsets are all the same, and those of ``unstable`` are not answered."""

    def __init__(self) -> None:
        self.live = self
        self.requests: list[Sequence[TopicPartition]] = []
        self.unstable: set[TopicPartition] = set()
        self.error: Exception | None = None
        self.commit = COMMIT
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def committed_offsets(self, tps: Sequence[TopicPartition], *, require_stable: bool) -> Any:
        assert require_stable
        self.requests.append(tps)
        commit = self.commit  # as of when the request comes
        await asyncio.sleep(0)
        await self.may_answer.wait()
        if self.error:
            raise self.error
        return {tp: commit for tp in tps if tp not in self.unstable}


class World:
    def __init__(self) -> None:
        self.consumer = FakeGroupConsumer()
        self.health = Health()
        consumer: Any = self.consumer
        self.offsets = CommittedOffsets(consumer, require_stable=True, request_timeout_s=5, health=self.health)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(module, "RETRY_S", 0.001)
    return World()


async def test_a_thousand_partitions_are_asked_for_by_one_request(world: World) -> None:
    assert await asyncio.gather(*map(world.offsets.of, PARTITIONS)) == [COMMIT] * 1_000
    assert len(world.consumer.requests) == 1


async def test_who_waits_holds_up_no_other(world: World) -> None:
    world.consumer.unstable = {TP}
    waiting = asyncio.create_task(world.offsets.of(TP))
    assert await world.offsets.of(PARTITIONS[1]) == COMMIT
    assert not waiting.done()
    world.consumer.unstable = set()
    assert await waiting == COMMIT


async def test_a_long_wait_is_told_until_it_ends(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.consumer.unstable = {TP}
    waiting = asyncio.create_task(world.offsets.of(TP))
    await until(lambda: len(world.consumer.requests) > 2)
    assert world.health.why_not_ready() is None
    monkeypatch.setattr(module, "LONG_S", 0.0)
    await until(world.health.why_not_ready)
    assert world.health.why_not_ready() == (
        "takeover: waiting for the end of a transaction that another process has left open: t-0"
    )
    world.consumer.unstable = set()
    await waiting
    await until(lambda: world.health.why_not_ready() is None)


async def test_a_partition_that_has_gone_is_waited_for_and_told_no_longer(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LONG_S", 0.0)
    world.consumer.unstable = {TP}
    waiting = asyncio.create_task(world.offsets.of(TP))
    await until(world.health.why_not_ready)
    await cancel_all([waiting])
    await until(lambda: world.health.why_not_ready() is None)
    asked = len(world.consumer.requests)
    assert await world.offsets.of(PARTITIONS[1]) == COMMIT
    assert list(world.consumer.requests[asked:]) == [(PARTITIONS[1],)]


async def test_a_partition_that_comes_back_does_not_begin_at_what_was_asked_for_before_it_went(world: World) -> None:
    """A coordinator that has been replaced may answer late, and others have committed since."""
    world.consumer.may_answer.clear()
    before = asyncio.create_task(world.offsets.of(TP))
    await until(lambda: world.consumer.requests)
    await cancel_all([before])
    begins = asyncio.create_task(world.offsets.of(TP))
    await asyncio.sleep(0)
    world.consumer.commit = OffsetAndMetadata(9, "topic_id=x")
    world.consumer.may_answer.set()
    assert await begins == OffsetAndMetadata(9, "topic_id=x")


async def test_an_error_is_every_callers_and_the_next_call_asks_again(world: World) -> None:
    world.consumer.error = KafkaConnectionError()
    answers = await asyncio.gather(*map(world.offsets.of, PARTITIONS[:2]), return_exceptions=True)
    assert [type(answer) for answer in answers] == [KafkaConnectionError] * 2
    world.consumer.error = None
    assert await world.offsets.of(TP) == COMMIT


async def test_brokers_that_cannot_tell_are_refused_with_a_sentence(world: World) -> None:
    member = Membership("g", 1, "member")
    plain = TxnOffsetCommitRequest_v0("id", "g", 1, 0, [])
    for request in (StableOffsetFetchRequest("g", [TP]), MemberTxnOffsetCommitRequest(plain, member)):
        with pytest.raises(NotImplementedError):
            request.prepare({9: (0, 6), 28: (0, 2)})  # the versions of Kafka 2.4
    world.consumer.error = NotImplementedError()
    with pytest.raises(WrongSetting, match=r"exactly-once needs brokers of Kafka 2\.5 or later"):
        await world.offsets.of(TP)


@pytest.mark.parametrize(
    ("of_all", "of_one", "error", "lacking"),
    [
        (GroupAuthorizationFailedError.errno, 0, GroupAuthorizationFailedError, "READ on group g"),
        (0, GroupAuthorizationFailedError.errno, GroupAuthorizationFailedError, "READ on group g"),
        (0, TopicAuthorizationFailedError.errno, TopicAuthorizationFailedError, "READ on topic t"),
    ],
)
async def test_a_refusal_names_what_may_not_be_read(
    of_all: int, of_one: int, error: type[KafkaError], lacking: str
) -> None:
    response = SimpleNamespace(API_VERSION=3, error_code=of_all, topics=[("t", [(0, -1, "", of_one)])])

    async def nothing() -> None: ...

    async def answer(_: Any) -> Any:
        return response

    coordinator = SimpleNamespace(group_id="g", coordinator_id=1, ensure_coordinator_known=nothing, _send_req=answer)
    consumer: Any = SimpleNamespace(_coordinator=coordinator)
    with pytest.raises(error) as refusal:
        await committed_offsets(consumer, [TP], require_stable=False)
    assert missing_permission(refusal.value, "READ") == f"missing {lacking}; add the ACL"
