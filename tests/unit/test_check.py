"""What `check` makes of answers that a real Kafka seldom gives."""

from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.errors import GroupAuthorizationFailedError, GroupCoordinatorNotAvailableError

from worker.commands.check import _members, _replicas
from worker.kafka.inspector import Inspector, TopicDescription


class NewCluster:
    """An admin client of brokers that nobody has asked for a group yet."""

    def __init__(self) -> None:
        self.refusals = 2

    async def describe_consumer_groups(self, groups: list[str]) -> list[Any]:
        if self.refusals:
            self.refusals -= 1
            raise GroupCoordinatorNotAvailableError
        return [SimpleNamespace(groups=[(0, "group", "Empty", "consumer", "", [])])]


async def test_the_first_group_of_a_new_cluster_is_waited_for() -> None:
    finding = await _members("group", Inspector(NewCluster()), 12)  # type: ignore[arg-type]
    assert (finding.verdict, finding.subject) == ("ok", "workers")


async def test_members_that_this_user_may_not_know_of_are_not_taken_for_none() -> None:
    async def refused(groups: list[str]) -> None:
        raise GroupAuthorizationFailedError(*groups)

    inspector: Any = Inspector(SimpleNamespace(describe_consumer_groups=refused))  # type: ignore[arg-type]
    finding = await _members("group", inspector, 12)
    assert (finding.verdict, "missing DESCRIBE on group group; add the ACL" in finding.sentence) == ("warn", True)


@pytest.mark.parametrize(
    ("replicas", "in_sync", "least", "verdict"),
    [(3, 3, 2, "ok"), (3, 1, 2, "fail"), (1, 1, 2, "fail"), (2, 2, 3, "fail"), (3, 3, 1, "warn"), (1, 1, 1, "warn")],
)
def test_an_output_that_brokers_accept_nothing_for_fails(replicas: int, in_sync: int, least: int, verdict: str) -> None:
    """However healthy each partition's leader is, acks=all needs min.insync.replicas."""
    topic = TopicDescription("out", (0,), (), replicas, in_sync, frozenset({1}), least)
    finding = _replicas(topic, is_output=True)
    assert finding.verdict == verdict
    assert ("accept nothing" in finding.sentence) == (verdict == "fail")
