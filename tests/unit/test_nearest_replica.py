"""Which broker a consumer with a rack fetches from, and whose word it takes."""

import asyncio
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import aiokafka.consumer.consumer
import pytest
from aiokafka import TopicPartition
from aiokafka.consumer.fetcher import Fetcher, FetchError
from aiokafka.consumer.subscription_state import SubscriptionState
from aiokafka.errors import KafkaConnectionError, OffsetOutOfRangeError, TopicAuthorizationFailedError
from aiokafka.protocol.fetch import FetchResponse_v11
from aiokafka.record.default_records import DefaultRecordBatchBuilder

from worker.kafka.aiokafka_compat.nearest_replica import NearestReplicaFetcher, leave_replica

LEADER, FOLLOWER = 1, 2
RACK = "near"
TP = TopicPartition("texts", 0)
OUT_OF_RANGE = 1
Answer = int | bytes | Exception  # an error code, records, or what a request raises


def a_batch() -> bytes:
    builder = DefaultRecordBatchBuilder(2, 0, False, -1, -1, 0, 1_000)
    builder.append(0, timestamp=0, key=None, value=b"text", headers=[])
    return bytes(builder.build())


class Brokers:
    """A leader, which names the follower to whoever gives a rack, and what that follower answers. Stands for a client."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, str]] = []  # the broker, and the rack that it was given
        self.known = {LEADER, FOLLOWER}
        self.updates = 0
        self.answer_s = 0.001
        self.follower: Answer = a_batch()
        self.leader: Answer = a_batch()
        self.follower_answers = asyncio.Event()
        self.follower_answers.set()
        self.cluster = SimpleNamespace(
            leader_for_partition=lambda _: LEADER,
            broker_metadata=lambda node: SimpleNamespace(nodeId=node) if node in self.known else None,
        )
        self._loop = asyncio.get_running_loop()
        self._metadata_max_age_ms = 300_000

    def force_metadata_update(self) -> "asyncio.Future[bool]":
        self.updates += 1
        done: asyncio.Future[bool] = self._loop.create_future()
        done.set_result(True)
        return done

    async def send(self, node: int, request: Any) -> Any:
        self.asked.append((node, request._rack_id))
        await asyncio.sleep(self.answer_s)
        if node == LEADER and request._rack_id:
            return answered(b"", FOLLOWER)
        if node == FOLLOWER:
            await self.follower_answers.wait()
        answer = self.leader if node == LEADER else self.follower
        if isinstance(answer, Exception):
            raise answer
        return answered(answer)

    def asks(self, node: int, rack: str) -> bool:
        return (node, rack) in self.asked


def answered(answer: int | bytes, preferred: int = -1) -> Any:
    code, records = (answer, b"") if isinstance(answer, int) else (0, answer)
    return FetchResponse_v11(0, 0, 0, [(TP.topic, [(TP.partition, code, 9, 9, 0, [], preferred, records)])])


@pytest.fixture
async def brokers() -> Brokers:
    return Brokers()


@pytest.fixture
async def fetcher(brokers: Brokers) -> AsyncIterator[NearestReplicaFetcher]:
    subscriptions = SubscriptionState()
    subscriptions.assign_from_user({TP})
    subscriptions.seek(TP, 0)
    options = {"auto_offset_reset": "none", "fetcher_timeout": 0.01, "retry_backoff_ms": 1}
    fetcher = aiokafka.consumer.consumer.Fetcher(brokers, subscriptions, client_rack=RACK, **options)
    yield fetcher
    await fetcher.close()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - what is waited for is aiokafka's, and has no event
            await asyncio.sleep(0.001)


async def test_records_are_fetched_from_the_replica_that_the_leader_names(
    brokers: Brokers, fetcher: NearestReplicaFetcher
) -> None:
    await until(lambda: TP in fetcher._records)
    assert brokers.asked == [(LEADER, RACK), (FOLLOWER, RACK)]


@pytest.mark.parametrize("fault", [OUT_OF_RANGE, 3, 6, 9, 56, 78, KafkaConnectionError()])
async def test_a_follower_that_fails_is_left_for_the_leader(
    brokers: Brokers, fetcher: NearestReplicaFetcher, fault: Answer
) -> None:
    brokers.follower = fault
    await until(lambda: TP in fetcher._records)
    assert brokers.asked == [(LEADER, RACK), (FOLLOWER, RACK), (LEADER, "")]
    assert not isinstance(fetcher._records[TP], FetchError)


async def test_an_offset_that_the_leader_does_not_have_is_out_of_range(
    brokers: Brokers, fetcher: NearestReplicaFetcher
) -> None:
    brokers.follower = brokers.leader = OUT_OF_RANGE
    await until(lambda: TP in fetcher._records)
    with pytest.raises(OffsetOutOfRangeError):
        fetcher._records[TP].check_raise()
    assert brokers.asked[-1] == (LEADER, "")


async def test_a_missing_permission_counts_whoever_tells_it(brokers: Brokers, fetcher: NearestReplicaFetcher) -> None:
    brokers.follower = TopicAuthorizationFailedError.errno
    await until(lambda: TP in fetcher._records)
    with pytest.raises(TopicAuthorizationFailedError):
        fetcher._records[TP].check_raise()


async def test_leaders_are_asked_for_a_while_and_then_name_a_replica_again(
    brokers: Brokers, fetcher: NearestReplicaFetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.kafka.aiokafka_compat.nearest_replica.LEADERS_S", 0.1)
    brokers.leader, brokers.follower = b"", KafkaConnectionError()
    await until(lambda: brokers.asks(LEADER, ""))
    brokers.follower = a_batch()
    await until(lambda: TP in fetcher._records)
    assert brokers.asked[-2:] == [(LEADER, RACK), (FOLLOWER, RACK)]


async def test_a_follower_that_is_not_known_yet_is_asked_for_and_the_leader_sends_records(
    brokers: Brokers, fetcher: NearestReplicaFetcher
) -> None:
    brokers.known = {LEADER}
    await until(lambda: TP in fetcher._records)
    assert brokers.asked == [(LEADER, RACK), (LEADER, "")]
    assert brokers.updates == 1


async def test_a_follower_that_is_named_for_long_is_not_taken_for_one_that_fails(
    brokers: Brokers, fetcher: NearestReplicaFetcher
) -> None:
    brokers.follower, brokers.answer_s = b"", 0.03
    fetcher._preferred_replica_ttl = 0.01  # it ends while the follower is being asked
    await until(lambda: brokers.asked.count((LEADER, RACK)) > 5)
    assert not brokers.asks(LEADER, "")


async def test_a_follower_that_hangs_is_left_on_demand_and_answers_too_late(
    brokers: Brokers, fetcher: NearestReplicaFetcher
) -> None:
    brokers.follower_answers.clear()
    brokers.follower = TopicAuthorizationFailedError.errno
    await until(lambda: brokers.asks(FOLLOWER, RACK))
    leave_replica(SimpleNamespace(_fetcher=fetcher), TP)
    await until(lambda: TP in fetcher._records)
    brokers.follower_answers.set()
    await until(lambda: FOLLOWER not in fetcher._in_flight)
    assert not isinstance(fetcher._records[TP], FetchError), "what the leader has sent is kept"
    assert not fetcher.error_future.done()


async def test_the_leader_alone_is_asked_where_to_begin(brokers: Brokers, fetcher: NearestReplicaFetcher) -> None:
    await until(lambda: TP in fetcher._records)
    assert fetcher._select_read_replica(TP) == FOLLOWER
    fetcher._subscriptions.subscription.assignment.state_value(TP).await_reset(-1)
    assert fetcher._select_read_replica(TP) == LEADER


async def test_without_a_rack_nothing_is_changed(brokers: Brokers) -> None:
    fetcher = aiokafka.consumer.consumer.Fetcher(brokers, SubscriptionState(), client_rack=None)
    assert type(fetcher) is Fetcher
    leave_replica(SimpleNamespace(_fetcher=fetcher), TP)
    await fetcher.close()
