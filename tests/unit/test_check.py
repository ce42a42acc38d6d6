"""What `check` makes of answers that a real Kafka seldom gives."""

from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.errors import GroupAuthorizationFailedError, GroupCoordinatorNotAvailableError

from worker.commands.check_kafka import _members, _replicas, _transactions
from worker.kafka.connection import Connection
from worker.kafka.inspector import Inspector, TopicDescription
from worker.kafka.permissions import Permissions


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


class Transactions:
    """The answers of an inspector about transactions."""

    def __init__(self, longest_ms: int | None, replicas: dict[str, int]) -> None:
        self.longest_ms, self.replicas = longest_ms, replicas

    async def open_old_transactions(self, *_: object) -> list[str]:
        return []

    async def longest_transaction_ms(self) -> int | None:
        return self.longest_ms

    async def internal_replicas(self) -> dict[str, int]:
        return self.replicas


@pytest.mark.parametrize(
    ("longest_ms", "replicas", "expected"),
    [
        (900_000, 3, []),
        (10_000, 3, []),
        (9_999, 3, [("transactions", "fail")]),
        (None, 3, []),  # it may not be read
        (900_000, 1, [("replicas", "warn")]),
    ],
)
async def test_what_is_in_the_way_of_transactions(
    longest_ms: int | None, replicas: int, expected: list[tuple[str, str]]
) -> None:
    inspector: Any = Transactions(longest_ms, {"__transaction_state": replicas})
    findings = [finding async for finding in _transactions("group", inspector, ["in"])]
    assert [(finding.subject, finding.verdict) for finding in findings] == expected


async def test_a_broker_that_refuses_short_transactions_and_topics_that_are_not_there_are_read_right() -> None:
    async def configs(_: object) -> list[Any]:
        entries = [("transaction.max.timeout.ms", "5000")]
        return [SimpleNamespace(resources=[(0, None, 4, "1", entries)])]

    async def topics(names: list[str]) -> list[dict[str, Any]]:
        partitions = [{"replicas": [1, 2]}, {"replicas": [1]}]
        return [{"topic": names[0], "partitions": partitions}, {"topic": names[1], "partitions": []}]

    brokers = SimpleNamespace(cluster=SimpleNamespace(brokers=lambda: [SimpleNamespace(nodeId=1)]))
    client = SimpleNamespace(_client=brokers, describe_configs=configs, describe_topics=topics)
    inspector = Inspector(client)  # type: ignore[arg-type]
    assert await inspector.longest_transaction_ms() == 5_000
    assert await inspector.internal_replicas() == {"__transaction_state": 1}


async def test_permissions_are_told_of_a_partition_without_a_leader_too() -> None:
    """Each broker checks them before it looks who leads; to send to no node would be an error."""
    asked: list[int] = []

    async def send(node: int, _: object) -> Any:
        asked.append(node)
        return SimpleNamespace(topics=[("out", [(0, 6)])])  # 6: NOT_LEADER_OR_FOLLOWER

    permissions = Permissions(Connection(("nowhere:1",)))
    for leader in (-1, None, 3):
        cluster = SimpleNamespace(leader_for_partition=lambda _, leader=leader: leader)
        client: Any = SimpleNamespace(cluster=cluster, get_random_node=lambda: 7, send=send)
        permissions._client = client
        assert await permissions.may_read("out")
        assert await permissions.may_write("out")
    assert asked == [7, 7, 7, 7, 3, 3]
