"""What a consumer takes for its group's committed offset, with answers as brokers give them."""

from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import (
    GroupAuthorizationFailedError,
    GroupCoordinatorNotAvailableError,
    GroupLoadInProgressError,
    KafkaError,
    NotCoordinatorForGroupError,
    UnknownTopicOrPartitionError,
)
from aiokafka.protocol.commit import OffsetFetchRequest_v1, OffsetFetchResponse_v1, OffsetFetchResponse_v3

from worker.consumer import Consumer, committed_offsets, offset_fetch

TP = TopicPartition("t", 3)


def whole(code: int) -> OffsetFetchResponse_v3:
    """A failure as a whole has no partitions."""
    return OffsetFetchResponse_v3(0, [], code)


def of_partition(offset: int, code: int = 0) -> OffsetFetchResponse_v3:
    return OffsetFetchResponse_v3(0, [("t", [(3, offset, "", code)])], 0)


class Coordinator:
    group_id = "g"

    def __init__(self, response: Any) -> None:
        self.response = response
        self.requests: list[Any] = []
        self.is_dead = False

    async def ensure_coordinator_known(self) -> None: ...

    async def _send_req(self, request: Any) -> Any:
        self.requests.append(request.build(OffsetFetchRequest_v1))
        return self.response

    def coordinator_dead(self) -> None:
        self.is_dead = True


async def committed(coordinator: Coordinator) -> int | None:
    return await Consumer.committed(SimpleNamespace(_coordinator=coordinator), TP)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("response", "offset"),
    [
        (of_partition(1201), 1201),
        (of_partition(0), 0),
        (of_partition(-1), None),
        (OffsetFetchResponse_v1([("t", [(3, 7, "", 0)])]), 7),
    ],
)
async def test_what_is_committed_is_the_partitions_answer(response: Any, offset: int | None) -> None:
    coordinator = Coordinator(response)
    assert await committed(coordinator) == offset
    [request] = coordinator.requests
    assert (request.consumer_group, request.topics) == ("g", [("t", [3])])


@pytest.mark.parametrize(
    ("response", "error", "is_dead"),
    [
        (whole(14), GroupLoadInProgressError, False),
        (whole(15), GroupCoordinatorNotAvailableError, True),
        (whole(16), NotCoordinatorForGroupError, True),
        (whole(30), GroupAuthorizationFailedError, False),
        (whole(0), GroupCoordinatorNotAvailableError, True),
        (of_partition(-1, 3), UnknownTopicOrPartitionError, False),
        (OffsetFetchResponse_v1([("t", [(3, -1, "", 16)])]), NotCoordinatorForGroupError, True),
        (OffsetFetchResponse_v1([("t", [(2, 5, "", 0)])]), GroupCoordinatorNotAvailableError, True),
    ],
)
async def test_no_answer_is_not_taken_for_nothing_committed(
    response: Any, error: type[KafkaError], is_dead: bool
) -> None:
    coordinator = Coordinator(response)
    with pytest.raises(error):
        await committed(coordinator)
    assert coordinator.is_dead == is_dead


def test_several_partitions_are_asked_for_at_once() -> None:
    tps = [TopicPartition("t", 0), TopicPartition("u", 1), TopicPartition("t", 2)]
    assert offset_fetch("g", tps).build(OffsetFetchRequest_v1).topics == [("t", [0, 2]), ("u", [1])]
    response = OffsetFetchResponse_v3(0, [("t", [(0, 5, None, 0), (2, -1, "", 0)]), ("u", [(1, 9, "m", 0)])], 0)
    found = committed_offsets(response, tps)
    assert [(found[tp].offset, found[tp].metadata) for tp in tps] == [(5, ""), (9, "m"), (-1, "")]
