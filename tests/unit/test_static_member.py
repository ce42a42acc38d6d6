"""What was added to aiokafka, beside fakes of its insides."""

from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.errors import GroupCoordinatorNotAvailableError, KafkaError, for_code

from worker.kafka.aiokafka_compat.group import InstanceIdTaken, StaticMember


class FakeCoordinator:
    """Of the group ``members``, by instance id; ``join_errors`` are raised by joins before any succeeds."""

    def __init__(self, members: dict[str, str]) -> None:
        self.group_id, self.member_id, self.members = "g", "", members
        self.join_errors: list[Exception] = []
        self.code = 0
        self.joins = self.deaths = 0

    async def _do_rejoin_group(self, _: object) -> bool:
        if self.join_errors:
            raise self.join_errors.pop(0)
        self.joins += 1
        self.member_id = self.members["i"] = self.member_id or f"i-{self.joins}"
        return True

    async def _send_req(self, _: object) -> Any:
        found = [(member, instance, "", "", b"", b"") for instance, member in self.members.items()]
        return SimpleNamespace(groups=[(self.code, "g", "Stable", "", "", found, 0)])

    def coordinator_dead(self) -> None:
        self.deaths += 1


def guarded(member: StaticMember, members: dict[str, str]) -> Any:
    coordinator = FakeCoordinator(members)
    member.guard(SimpleNamespace(_coordinator=coordinator))  # type: ignore[arg-type]
    return coordinator


async def test_a_newcomer_asks_nobody_and_a_member_that_was_replaced_joins_no_more() -> None:
    members, member = {"i": "i-of-the-process-before"}, StaticMember("i")
    coordinator = guarded(member, members)
    assert await coordinator._do_rejoin_group(None)
    assert members == {"i": "i-1"}

    coordinator.member_id, members["i"] = "", "i-of-another"  # as aiokafka forgets it on UNKNOWN_MEMBER_ID
    for joining in (coordinator, guarded(member, members)):  # the next consumer of this process neither
        with pytest.raises(InstanceIdTaken):
            await joining._do_rejoin_group(None)
    assert members == {"i": "i-of-another"}


async def test_a_member_whose_session_ran_out_and_one_that_is_still_there_join_again() -> None:
    members: dict[str, str] = {}
    member = StaticMember("i")
    for is_forgotten in (False, True, False):
        if is_forgotten:
            members.clear()
        assert await guarded(member, members)._do_rejoin_group(None)


async def test_nobody_joins_while_the_group_cannot_say_who_holds_the_id() -> None:
    coordinator = guarded(StaticMember("i"), {})
    await coordinator._do_rejoin_group(None)
    coordinator.member_id, coordinator.code = "", GroupCoordinatorNotAvailableError.errno
    assert not await coordinator._do_rejoin_group(None)
    assert (coordinator.joins, coordinator.deaths) == (1, 1)


async def test_a_join_whose_answer_was_lost_may_be_done_again() -> None:
    """The group may know this process by a member id that it has never been told."""
    members: dict[str, str] = {}
    coordinator = guarded(StaticMember("i"), members)
    await coordinator._do_rejoin_group(None)
    coordinator.member_id = ""
    coordinator.join_errors.append(KafkaError("the connection broke"))
    with pytest.raises(KafkaError):
        await coordinator._do_rejoin_group(None)
    members["i"] = "i-of-this-very-process"
    assert await coordinator._do_rejoin_group(None)


async def test_the_groups_own_word_that_another_has_taken_the_id_is_final() -> None:
    coordinator = guarded(StaticMember("i"), {})
    coordinator.join_errors.append(KafkaError(repr(for_code(82)())))  # as aiokafka raises what it does not know
    with pytest.raises(InstanceIdTaken):
        await coordinator._do_rejoin_group(None)
