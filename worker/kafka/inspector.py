"""Asks the brokers about topics and groups, once each, and changes nothing: what ``check`` wants to know of Kafka."""

import contextlib
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import GroupAuthorizationFailedError, GroupCoordinatorNotAvailableError

from worker.kafka.aiokafka_compat.group import instance_ids
from worker.kafka.aiokafka_compat.metadata import broker_racks, inner_client, known_brokers
from worker.kafka.aiokafka_compat.transactions import open_transactions
from worker.kafka.backlog import offsets_since, valid_offsets
from worker.kafka.clients import admin_client, stop_client
from worker.kafka.connection import UNREACHABLE, Connection
from worker.kafka.consumer import Consumer
from worker.kafka.topics import TopicLimits, matching_topics, missing_topics, topic_limits
from worker.kafka.transactional_sink import refuse_old_brokers
from worker.runtime.backoff import Backoff
from worker.runtime.tasks import within

CLOSE_S: Final = 5.0
INTERNAL_TOPICS: Final = ("__transaction_state", "__consumer_offsets")


class TopicDescription(NamedTuple):
    """A topic's partitions and who has them. ``replicas`` and ``in_sync`` are those of the partition that has the fewest."""

    name: str
    partitions: tuple[int, ...]
    leaderless: tuple[int, ...]
    replicas: int
    in_sync: int
    brokers: frozenset[int]
    min_insync_replicas: int


class Inspector:
    """Questions to one cluster, by an admin client. ``start`` comes before the first question, ``close`` after the last.

    Every call but ``close`` raises what is in UNREACHABLE; none has a deadline of its own but ``start``.
    """

    def __init__(self, client: AIOKafkaAdminClient) -> None:
        self._client = client

    @classmethod
    def of(cls, connection: Connection, topics: Iterable[str]) -> "Inspector":
        """``topics`` are those that will be asked about, as far as they are known."""
        return cls(admin_client(connection, topics))

    async def start(self, timeout_s: float) -> int:
        """Connects, and answers with how many brokers there are."""
        await within(timeout_s, self._client.start())
        return known_brokers(self._client)

    async def close(self) -> None:
        with contextlib.suppress(*UNREACHABLE):
            await within(CLOSE_S, self._client.close())

    async def refuse_old_brokers(self) -> None:
        """Raises WrongSetting where a broker cannot deliver exactly once."""
        await refuse_old_brokers(self._client)

    async def matching(self, pattern: str) -> tuple[str, ...]:
        """The topics that match the setting ``input_pattern``, in order."""
        return await matching_topics(self._client, pattern)

    async def missing(self, topics: Mapping[str, Iterable[str]]) -> str:
        """What is wrong with topics, by role, as a sentence; empty if they can be used."""
        return await missing_topics(self._client, topics)

    async def limits(self, topics: Iterable[str]) -> dict[str, TopicLimits]:
        """What topics accept; Kafka's defaults for those whose settings this user may not read."""
        return await topic_limits(self._client, list(topics))

    async def open_old_transactions(self, group: str, topics: Collection[str]) -> list[str]:
        """The open transactions of workers before 0.2.0, which had a transactional id for each input partition."""
        prefixes = tuple(f"{group}/{topic}/" for topic in topics)
        ids = await open_transactions(self._client)
        return sorted(each for each in ids if each.startswith(prefixes) and each.rpartition("/")[2].isdecimal())

    async def topics(self, names: Sequence[str]) -> list[TopicDescription]:
        """Descriptions of topics that exist, in this order."""
        described = {topic["topic"]: topic for topic in await self._client.describe_topics(list(names))}
        return [await self._description(described[name]) for name in names]

    async def _description(self, topic: Mapping[str, Any]) -> TopicDescription:
        name, partitions = topic["topic"], topic["partitions"]
        config = await self._config(ConfigResourceType.TOPIC, name)
        return TopicDescription(
            name,
            tuple(each["partition"] for each in partitions),
            tuple(each["partition"] for each in partitions if each["leader"] < 0),
            min(len(each["replicas"]) for each in partitions),
            min(len(each["isr"]) for each in partitions),
            frozenset(node for each in partitions for node in each["replicas"]),
            int(config.get("min.insync.replicas") or 1),
        )

    async def _config(self, kind: ConfigResourceType, name: str) -> dict[str, str | None]:
        """The settings of a topic or a broker; none where this user may not read them."""
        answers = await self._client.describe_configs([ConfigResource(kind, name)])
        return {entry[0]: entry[1] for answer in answers for resource in answer.resources for entry in resource[4]}

    async def why_no_replica_in(self, rack: str) -> str:
        """Why records cannot be read from replicas in this rack; empty if they can, as far as this user may know."""
        racks = broker_racks(self._client)
        if rack not in racks.values():
            known = ", ".join(sorted({each for each in racks.values() if each})) or "none"
            return f"no broker has broker.rack {rack} (they have: {known})"
        for node in racks:
            config = await self._config(ConfigResourceType.BROKER, str(node))
            if config and not config.get("replica.selector.class"):
                return f"broker {node} has no replica.selector.class, such as RackAwareReplicaSelector"
        return ""

    async def longest_transaction_ms(self) -> int | None:
        """The least ``transaction.max.timeout.ms`` of the brokers; None where this user may not read it."""
        nodes = [str(broker.nodeId) for broker in inner_client(self._client).cluster.brokers()]
        configs = [await self._config(ConfigResourceType.BROKER, node) for node in nodes]
        return min((int(limit) for each in configs if (limit := each.get("transaction.max.timeout.ms"))), default=None)

    async def internal_replicas(self) -> dict[str, int]:
        """The fewest replicas of a partition, by internal topic of transactions and offsets; of those that can be seen."""
        described = await self._client.describe_topics(list(INTERNAL_TOPICS))
        partitions = {topic["topic"]: topic["partitions"] for topic in described}
        return {name: min(len(each["replicas"]) for each in some) for name, some in partitions.items() if some}

    async def is_instance_id_taken(self, group: str, instance_id: str) -> bool:
        """Whether a member of a group has this instance id, as far as this user may know."""
        try:
            return instance_id in await instance_ids(self._client, group)
        except GroupAuthorizationFailedError:
            return False

    async def members(self, group: str) -> int | None:
        """How many members a consumer group has; None where this user may not know."""
        backoff = Backoff()
        while True:
            try:
                answers = await self._client.describe_consumer_groups([group])
            except GroupCoordinatorNotAvailableError:
                await backoff.wait()  # Kafka creates the topic of offsets for the first one who asks
            except GroupAuthorizationFailedError:
                return None
            else:
                return sum(len(description[5]) for answer in answers for description in answer.groups)


async def unread_older_than(
    age_ms: int,
    connection: Connection,
    topics: Iterable[TopicDescription],
    *,
    group_id: str,
    auto_offset_reset: str,
    since_ms: int | None,
) -> int:
    """An upper bound of the records of this age or older that the group has yet to read.

    Joins no group and commits nothing. Raises what is in UNREACHABLE, after two requests' time at most.
    """
    tps = [TopicPartition(topic.name, number) for topic in topics for number in topic.partitions]
    consumer = Consumer(**connection.options(), group_id=group_id, enable_auto_commit=False)
    try:
        await within(connection.request_timeout_s, consumer.start())
        consumer.assign(tps)
        moment_ms = int(time.time() * 1000) - age_ms
        looking = _unread_before(consumer, tps, moment_ms, auto_offset_reset, since_ms)
        return await within(connection.request_timeout_s, looking)
    finally:
        await stop_client(consumer, "consumer", CLOSE_S)


async def _unread_before(
    consumer: Consumer,
    tps: Collection[TopicPartition],
    moment_ms: int,
    auto_offset_reset: str,
    since_ms: int | None = None,
) -> int:
    """How many records the group has not read that stand before the first one of that moment or later."""
    begins, ends = await consumer.beginning_offsets(tps), await consumer.end_offsets(tps)
    committed, _ = await valid_offsets(consumer, tps)
    newer = await consumer.offsets_for_times(dict.fromkeys(tps, moment_ms))
    resets = begins if auto_offset_reset == "earliest" else ends
    if since_ms is not None:
        resets = await offsets_since(consumer, since_ms, ends)
    unread = 0
    for tp in tps:
        begin = committed.get(tp, resets[tp])
        unread += max(0, (newer[tp].offset if newer.get(tp) else ends[tp]) - max(begin, begins[tp]))
    return unread
