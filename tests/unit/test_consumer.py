"""What a consumer takes for its group's committed offsets, with answers as brokers give them."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import (
    GroupAuthorizationFailedError,
    IllegalStateError,
    KafkaConnectionError,
    KafkaError,
    TopicAuthorizationFailedError,
)
from aiokafka.protocol.commit import OffsetFetchRequest_v1, OffsetFetchResponse_v1, OffsetFetchResponse_v3

from worker.kafka.aiokafka_compat import offsets as module
from worker.kafka.consumer import Consumer

TP = TopicPartition("t", 3)


@pytest.fixture(autouse=True)
def _without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0)


def whole(code: int) -> OffsetFetchResponse_v3:
    """A failure as a whole has no partitions."""
    return OffsetFetchResponse_v3(0, [], code)


def of_partition(offset: int, code: int = 0) -> OffsetFetchResponse_v3:
    return OffsetFetchResponse_v3(0, [("t", [(3, offset, "", code)])], 0)


class Coordinator:
    """Gives these answers one after the other."""

    group_id = "g"
    coordinator_id = 1

    def __init__(self, *answers: Any) -> None:
        self.answers: Iterator[Any] = iter(answers)
        self.requests: list[Any] = []
        self.deaths = 0

    async def ensure_coordinator_known(self) -> None: ...

    async def _send_req(self, request: Any) -> Any:
        self.requests.append(request.build(OffsetFetchRequest_v1))
        answer = next(self.answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def coordinator_dead(self) -> None:
        self.deaths += 1


def asking(coordinator: Any) -> Consumer:
    consumer = Consumer.__new__(Consumer)  # without a client, which would want brokers
    consumer._coordinator = coordinator
    consumer._closed = True
    return consumer


async def committed(coordinator: Any) -> int:
    offset: int = (await asking(coordinator).committed_offsets([TP]))[TP].offset
    return offset


@pytest.mark.parametrize(
    ("response", "offset"),
    [
        (of_partition(1201), 1201),
        (of_partition(0), 0),
        (of_partition(-1), -1),
        (OffsetFetchResponse_v1([("t", [(3, 7, "", 0)])]), 7),
    ],
)
async def test_what_is_committed_is_the_partitions_answer(response: Any, offset: int) -> None:
    coordinator = Coordinator(response)
    assert await committed(coordinator) == offset
    [request] = coordinator.requests
    assert (request.consumer_group, request.topics) == ("g", [("t", [3])])


@pytest.mark.parametrize(
    ("answer", "deaths"),
    [
        (whole(14), 0),  # the coordinator is loading
        (whole(15), 1),  # it is not there
        (whole(16), 1),  # it is another one
        (whole(0), 1),  # nothing is said of the partition
        (OffsetFetchResponse_v1([("t", [(2, 5, "", 0)])]), 1),
        (OffsetFetchResponse_v1([("t", [(3, -1, "", 16)])]), 1),
        (of_partition(-1, 14), 0),
        (KafkaConnectionError(), 0),
    ],
)
async def test_no_answer_is_not_taken_for_nothing_committed(answer: Any, deaths: int) -> None:
    coordinator = Coordinator(answer, answer, of_partition(1201))
    assert await committed(coordinator) == 1201
    assert len(coordinator.requests) == 3
    assert coordinator.deaths == 2 * deaths


async def test_a_late_answer_does_not_end_the_coordinator_that_was_found_since() -> None:
    class Moved(Coordinator):
        async def _send_req(self, request: Any) -> Any:
            self.coordinator_id += 1  # others have found it meanwhile
            return await super()._send_req(request)

    coordinator = Moved(whole(16), of_partition(5))
    assert (await committed(coordinator), coordinator.deaths) == (5, 0)


@pytest.mark.parametrize(
    ("answer", "error"),
    [(whole(30), GroupAuthorizationFailedError), (of_partition(-1, 29), TopicAuthorizationFailedError)],
)
async def test_what_does_not_pass_by_itself_is_raised(answer: Any, error: type[KafkaError]) -> None:
    with pytest.raises(error):
        await committed(Coordinator(answer))


async def test_several_partitions_are_asked_for_at_once() -> None:
    tps = [TopicPartition("t", 0), TopicPartition("u", 1), TopicPartition("t", 2)]
    response = OffsetFetchResponse_v3(0, [("t", [(0, 5, None, 0), (2, -1, "", 0)]), ("u", [(1, 9, "m", 0)])], 0)
    coordinator = Coordinator(response)
    found = await asking(coordinator).committed_offsets(tps)
    assert coordinator.requests[0].topics == [("t", [0, 2]), ("u", [1])]
    assert [(found[tp].offset, found[tp].metadata) for tp in tps] == [(5, ""), (9, "m"), (-1, "")]


async def test_a_seek_between_two_assignments_is_one_of_a_partition_that_is_not_assigned() -> None:
    """aiokafka asserts there, and raises what it says only while other partitions are assigned."""
    consumer = Consumer(group_id="g")
    consumer._fetcher = SimpleNamespace(seek_to=consumer._subscription.seek)
    consumer.subscribe(["t"])
    with pytest.raises(AssertionError):
        AIOKafkaConsumer.seek(consumer, TP, 5)
    with pytest.raises(IllegalStateError):
        consumer.seek(TP, 5)
