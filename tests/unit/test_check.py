"""What `check` makes of answers that a real Kafka seldom gives."""

from types import SimpleNamespace
from typing import Any

from aiokafka.errors import GroupCoordinatorNotAvailableError

from worker.commands.check import _members
from worker.kafka.inspector import Inspector


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
