"""What the inspector makes of answers that a real Kafka seldom gives."""

from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import KafkaConnectionError
from aiokafka.structs import OffsetAndMetadata

from tests.support.metadata import READABLE_ID
from worker.core.topic_ids import with_topic_id
from worker.errors import WrongSetting
from worker.kafka.inspector import Inspector, _unread_before


@pytest.mark.parametrize(("named", "unread"), [("", 2), ("the topic", 2), ("the one before it", 10)])
async def test_an_offset_of_another_topic_is_no_place_to_read_on_from(named: str, unread: int) -> None:
    tp = TopicPartition("texts", 0)
    ids = {"": "", "the topic": READABLE_ID, "the one before it": "of-a-topic-before-this"}

    async def said(what: Any) -> Any:
        return what

    consumer: Any = SimpleNamespace(
        beginning_offsets=lambda _: said({tp: 0}),
        end_offsets=lambda _: said({tp: 20}),
        topic_ids=lambda topics: said(dict.fromkeys(topics, READABLE_ID)),
        committed_offsets=lambda _: said({tp: OffsetAndMetadata(8, with_topic_id(ids[named]))}),
        offsets_for_times=lambda _: said({tp: SimpleNamespace(offset=10)}),
    )
    assert await _unread_before(consumer, [tp], 0, "earliest") == unread


NEW, OLD = {28: 5, 9: 9}, {28: 2, 9: 7}  # the newest versions of TxnOffsetCommit and OffsetFetch; OLD as of Kafka 2.4


class Cluster:
    """Brokers of a client, by their numbers, with the versions that each knows; None for one that does not answer."""

    def __init__(self, *brokers: dict[int, int] | None) -> None:
        self._brokers = brokers
        names = [SimpleNamespace(nodeId=number, host="b", port=number) for number in range(len(brokers))]
        self.cluster = SimpleNamespace(brokers=lambda: names)

    async def send(self, node: int, _: object) -> Any:
        versions = self._brokers[node]
        if versions is None:
            raise KafkaConnectionError
        return SimpleNamespace(api_versions=[(key, 0, newest) for key, newest in versions.items()])


async def test_brokers_before_2_5_are_named() -> None:
    await Inspector(Cluster(NEW, None)).refuse_old_brokers()  # type: ignore[arg-type]
    for old in (OLD, {28: 3, 9: 6}, {9: 7}):
        with pytest.raises(
            WrongSetting, match=r"exactly-once needs brokers of Kafka 2\.5 or later; older than that: b:1$"
        ):
            await Inspector(Cluster(NEW, old, None)).refuse_old_brokers()  # type: ignore[arg-type]


RACK_AWARE = {"replica.selector.class": "org.apache.kafka.common.replica.RackAwareReplicaSelector"}


@pytest.mark.parametrize(
    ("racks", "config", "words"),
    [
        ([None, None], RACK_AWARE, "no broker has broker.rack b (they have: none)"),
        (["c", "a"], RACK_AWARE, "no broker has broker.rack b (they have: a, c)"),
        (["a", "b"], {"replica.selector.class": None}, "broker 0 has no replica.selector.class"),
        (["a", "b"], RACK_AWARE, ""),
        (["a", "b"], {}, ""),  # this user may not read what brokers are set to
    ],
)
async def test_a_rack_in_which_nothing_can_be_read_from_is_explained(
    racks: list[str | None], config: dict[str, str | None], words: str
) -> None:
    async def described(_: object) -> list[Any]:
        entries = list(config.items())
        return [SimpleNamespace(resources=[(0, "", 4, "0", entries)])]

    brokers = [SimpleNamespace(nodeId=number, rack=rack) for number, rack in enumerate(racks)]
    cluster = SimpleNamespace(brokers=lambda: brokers)
    client: Any = SimpleNamespace(_client=SimpleNamespace(cluster=cluster), describe_configs=described)
    assert (await Inspector(client).why_no_replica_in("b")).startswith(words)
    assert bool(await Inspector(client).why_no_replica_in("b")) == bool(words)
