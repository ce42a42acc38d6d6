"""Committed offsets, with their errors: aiokafka's consumer, but for what it says is committed.

From version 2 on (KIP-88) an OffsetFetch that fails as a whole says so beside its partitions, of which it then has none:
so it does while the group's coordinator is loading or has moved. aiokafka 0.14 looks at the partitions alone, and takes that
for a group that has committed nothing: it would begin at ``auto_offset_reset``, and repeat or lose all that is between.
"""

from collections.abc import Iterable
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import GroupCoordinatorNotAvailableError, NoError, NotCoordinatorForGroupError, for_code
from aiokafka.protocol.commit import OffsetFetchRequest
from aiokafka.structs import OffsetAndMetadata


class Consumer(AIOKafkaConsumer):  # type: ignore[misc]
    """aiokafka's, with a ``committed`` that tells "there is none" from "the coordinator cannot say"."""

    async def committed(self, partition: TopicPartition) -> int | None:
        """The group's committed offset, None where there is none. Raises KafkaError, retriable if it may be asked again.

        May wait without end for a coordinator to be found.
        """
        coordinator = self._coordinator
        await coordinator.ensure_coordinator_known()
        response = await coordinator._send_req(offset_fetch(coordinator.group_id, [partition]))
        try:
            offset: int = committed_offsets(response, [partition])[partition].offset
        except (GroupCoordinatorNotAvailableError, NotCoordinatorForGroupError):
            coordinator.coordinator_dead()  # it is looked up anew
            raise
        return offset if offset >= 0 else None


def offset_fetch(group_id: str, partitions: Iterable[TopicPartition]) -> OffsetFetchRequest:
    """The request for a group's committed offsets of some partitions."""
    by_topic: dict[str, list[int]] = {}
    for tp in partitions:
        by_topic.setdefault(tp.topic, []).append(tp.partition)
    return OffsetFetchRequest(group_id, list(by_topic.items()))


def committed_offsets(response: Any, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, OffsetAndMetadata]:
    """What a response to ``offset_fetch`` says of these partitions; a negative offset where nothing is committed.

    Raises the KafkaError of the response or of a partition; GroupCoordinatorNotAvailableError if it says nothing of one.
    """
    _raise_for(getattr(response, "error_code", 0))
    found = {}
    for topic, answers in response.topics:
        for partition, offset, metadata, code in answers:
            _raise_for(code)
            found[TopicPartition(topic, partition)] = OffsetAndMetadata(offset, metadata or "")
    if not found.keys() >= set(partitions):
        raise GroupCoordinatorNotAvailableError
    return found


def _raise_for(code: int) -> None:
    error = for_code(code)
    if error is not NoError:
        raise error
