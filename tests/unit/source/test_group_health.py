"""The group's coordinator, and rebalances that last."""

import asyncio
import contextlib
import re
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.errors import (
    GroupCoordinatorNotAvailableError,
    KafkaConnectionError,
    NodeNotReadyError,
    RebalanceInProgressError,
)
from aiokafka.protocol.group import HeartbeatRequest, JoinGroupRequest

from tests.support.source import (
    TP,
    Clock,
    FakeConsumer,
    staged,
    until,
)


class FakeCoordinator:
    """Answers what is sent to it, with a code or at all, as the test says. Without a generation nobody looks for a twin."""

    coordinator_id = None
    generation = 0

    def __init__(self) -> None:
        self.code: int | None = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def _send_req(self, request: Any) -> Any:
        await self.may_answer.wait()
        if self.code is None:
            raise NodeNotReadyError
        return SimpleNamespace(error_code=self.code)

    async def beat(self) -> None:
        try:
            await self._send_req(HeartbeatRequest("g", 1, "m"))
        except NodeNotReadyError:
            return


def told_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    said = [record.getMessage() for record in caplog.records if record.name == "worker.telemetry.health"]
    return [re.sub(r"(recovered) after [\d.]+ s$", r"\1", sentence) for sentence in said]


def join() -> JoinGroupRequest:
    return JoinGroupRequest("g", 1, 1, "m", "", "consumer", [])


@pytest.mark.parametrize("code", [None, GroupCoordinatorNotAvailableError.errno])
async def test_a_coordinator_that_is_away_is_told_once_by_its_age(
    consumer: FakeConsumer, clock: Clock, caplog: pytest.LogCaptureFixture, code: int | None
) -> None:
    """Whether it cannot be reached or has moved; no reader and no lag says otherwise meanwhile."""
    consumer._coordinator = coordinator = FakeCoordinator()
    stage = await staged(consumer, clock=clock)
    await stage.assign(TP)
    await coordinator.beat()
    coordinator.code = code
    consumer.unplaceable = GroupCoordinatorNotAvailableError()
    await stage.revoke(TP)
    await stage.assign(TP)
    for _ in range(8):
        clock.ahead += 1
        await coordinator.beat()
        await asyncio.sleep(0.02)
    assert stage.health.why_not_ready() is None, "it may be moving"
    for _ in range(40):
        clock.ahead += 1
        await coordinator.beat()
        await asyncio.sleep(0.02)
    reason = "the coordinator of group g has not answered for 9 s"
    assert stage.health.why_not_ready() == f"coordinator: {reason}"
    coordinator.code, consumer.unplaceable = 0, None
    await coordinator.beat()
    await until(lambda: stage.health.why_not_ready() is None)
    assert told_of(caplog) == [reason, "coordinator: recovered"]


@pytest.mark.parametrize("code", [None, GroupCoordinatorNotAvailableError.errno])
async def test_a_join_that_fails_is_no_answer_of_the_coordinator(
    consumer: FakeConsumer, clock: Clock, code: int | None
) -> None:
    consumer._coordinator = coordinator = FakeCoordinator()
    stage = await staged(consumer, clock=clock)
    await stage.assign(TP)
    await coordinator.beat()
    coordinator.code = code
    await stage.revoke(TP)
    for _ in range(20):
        clock.ahead += 1
        with contextlib.suppress(NodeNotReadyError):
            await coordinator._send_req(join())
        await asyncio.sleep(0.02)
    reason = "coordinator: the coordinator of group g has not answered for 9 s"
    assert stage.health.why_not_ready() == reason


async def test_joins_that_are_refused_at_once_are_a_rebalance_that_lasts(consumer: FakeConsumer, clock: Clock) -> None:
    """Nobody looks in the moment in which one is under way."""
    consumer._coordinator = coordinator = FakeCoordinator()
    stage = await staged(consumer, clock=clock)
    await stage.assign(TP)
    await coordinator.beat()
    await stage.revoke(TP)
    coordinator.code = RebalanceInProgressError.errno
    for _ in range(10):
        clock.ahead += 1
        await coordinator._send_req(join())
        await asyncio.sleep(0.02)
    assert stage.health.why_not_ready() == "group: rejoining for more than 5 s: a member is gone or busy"


async def test_a_coordinator_that_is_away_with_all_others_is_not_told_apart(
    consumer: FakeConsumer, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    consumer._coordinator = coordinator = FakeCoordinator()
    stage = await staged(consumer, clock=clock)
    await stage.assign(TP)
    await coordinator.beat()
    consumer.unknown = {TP: KafkaConnectionError()}
    await asyncio.sleep(0.05)
    for _ in range(10):
        clock.ahead += 4
        await asyncio.sleep(0.02)
    consumer.unknown = {}
    await until(lambda: stage.health.why_not_ready() is None)
    assert [line for line in told_of(caplog) if "coordinator" in line] == []


async def test_a_rebalance_that_lasts_is_told(
    consumer: FakeConsumer, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    consumer._coordinator = coordinator = FakeCoordinator()
    stage = await staged(consumer, clock=clock)
    clock.ahead += 6
    await asyncio.sleep(0.05)
    assert stage.health.why_not_ready() == "group: not joined yet"
    await stage.assign(TP)
    coordinator.may_answer.clear()
    await stage.revoke(TP)
    joining = asyncio.create_task(coordinator._send_req(JoinGroupRequest("g", 1, 1, "m", "", "consumer", [])))
    clock.ahead += 4
    await asyncio.sleep(0.05)
    assert stage.health.why_not_ready() is None
    clock.ahead += 20
    await until(lambda: stage.health.why_not_ready() == "group: rejoining for more than 5 s: a member is gone or busy")
    coordinator.may_answer.set()
    await joining
    await stage.assign(TP)
    assert stage.health.why_not_ready() is None
    assert told_of(caplog) == ["rejoining for more than 5 s: a member is gone or busy", "group: recovered"]
