"""Topics: whether they can be used, what they accept, and which of them match a pattern. Creates none."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaError

from worker.errors import UserError, WrongSetting
from worker.kafka.aiokafka_compat.metadata import topic_names
from worker.kafka.clients import admin_client, close_admin
from worker.kafka.connection import UNREACHABLE, Connection, error_name, unreachable
from worker.kafka.diagnosis import why_unreachable
from worker.runtime.backoff import Backoff
from worker.settings.values import whole_name
from worker.telemetry.health import Health

Answer = TypeVar("Answer")

NO_LIMIT: Final = 2**63 - 1
WATCH_S: Final = 3.0
_TOPIC_TROUBLES: Final = {
    3: "does not exist; create it, or name another",
    17: "has a name that Kafka does not allow; name another",
    29: "cannot be seen without DESCRIBE, whether it exists or not; add the ACL (READ or WRITE brings it)",
}


class BrokersAway(UserError):
    """No broker can be used, for longer than a command waits; the message says why."""

    exit_code = 1


class TopicsMissing(UserError):
    """A topic cannot be used, for longer than a command waits; the message says which, and what to do."""

    exit_code = 1


@dataclass(frozen=True)
class TopicLimits:
    """What a topic accepts and how long it keeps records, as Kafka's settings of these names; defaults are Kafka's own.

    ``is_known``: a broker has told them. Where none has, no record is refused by them. ``retention_ms`` is the age, by its
    own timestamp, at which a record is deleted: NO_LIMIT where it never is, or where the broker sets the timestamp.
    """

    max_message_bytes: int = 1_048_588
    timestamp_before_max_ms: int = NO_LIMIT
    timestamp_after_max_ms: int = 3_600_000
    is_log_append_time: bool = False
    is_compacted: bool = False
    retention_ms: int = NO_LIMIT
    is_known: bool = False

    @property
    def is_one_sided(self) -> bool:
        """Whether timestamps have no more than one limit, so that all old or all future ones are accepted."""
        return NO_LIMIT in (self.timestamp_before_max_ms, self.timestamp_after_max_ms)

    def excess_ms(self, timestamp: int) -> float:
        """By how many ms a timestamp is beyond the limits, by this machine's clock; negative within them."""
        now = time.time() * 1000
        return max(timestamp - now - self.timestamp_after_max_ms, now - self.timestamp_before_max_ms - timestamp)


async def wait_until_usable(
    connection: Connection, topics: Mapping[str, Iterable[str]], health: Health, *, patience_s: float = math.inf
) -> dict[str, TopicLimits]:
    """Waits for the brokers and for every topic, by its role (``{"input_topics": [...], …}``), and creates none.

    Returns the limits of each topic. Health logs once what is missing. Raises WrongSetting where the brokers refuse login
    or certificate, and BrokersAway or TopicsMissing where no broker or not all topics could be used for ``patience_s``.
    """
    names = [name for group in topics.values() for name in group]

    async def look(client: AIOKafkaAdminClient) -> tuple[str, dict[str, TopicLimits]]:
        missing = await missing_topics(client, topics)
        return missing, {} if missing else await topic_limits(client, names)

    return await _until_nothing_is_missing(connection, health, look, names, patience_s=patience_s)


async def wait_for_a_match(connection: Connection, pattern: str, health: Health) -> tuple[str, ...]:
    """Waits until topics match the setting ``input_pattern``, and returns them in order. Raises WrongSetting."""

    async def look(client: AIOKafkaAdminClient) -> tuple[str, tuple[str, ...]]:
        names = await matching_topics(client, pattern)
        return "" if names else no_match(pattern), names

    return await _until_nothing_is_missing(connection, health, look)


async def _until_nothing_is_missing(
    connection: Connection,
    health: Health,
    look: Callable[[AIOKafkaAdminClient], Awaitable[tuple[str, Answer]]],
    names: Iterable[str] = (),
    *,
    patience_s: float = math.inf,
) -> Answer:
    """Calls ``look`` until nothing is missing, and returns the answer that it then gives.

    ``look`` returns what is missing as a sentence, empty if nothing is, and its answer.
    """
    backoff = Backoff()
    began = answered = time.monotonic()
    while True:
        client = admin_client(connection, names)
        try:
            async with asyncio.timeout(connection.request_timeout_s):
                await client.start()
                missing, answer = await look(client)
                health.working("kafka")
                answered = time.monotonic()
                if not missing:
                    health.working("topics")
                    return answer
            health.failing("topics", f"{missing}; waiting for it")
            if answered - began > patience_s:
                raise TopicsMissing(f"{missing}; waited {patience_s:g} s for it")
        except UNREACHABLE as error:
            why = await why_unreachable(connection)
            health.failing("kafka", unreachable(connection, error, why))
            if time.monotonic() - answered > patience_s:
                raise BrokersAway(f"no broker could be used for {patience_s:g} s: {why or error_name(error)}") from None
        finally:
            await close_admin(client)
        await backoff.wait()


async def watch_topics(
    connection: Connection, topics: Mapping[str, Iterable[str]], health: Health, *, every_s: float = WATCH_S
) -> None:
    """Tells health while a topic that is in use, by its role, does not exist or may not be used. Does not end.

    Two responses in a row have to say so, because a broker that has just started may not know of a topic yet.
    """
    client, before = None, ""
    try:
        while True:
            await asyncio.sleep(every_s)
            try:
                async with asyncio.timeout(connection.request_timeout_s):
                    if client is None:
                        client = admin_client(connection, (name for names in topics.values() for name in names))
                        await client.start()
                    missing = await missing_topics(client, topics)
            except UNREACHABLE:
                if client is not None:
                    await close_admin(client)
                client = None
                if not health.is_working("kafka"):  # other tasks report the trouble; this adds the reason
                    health.explain("kafka", await _reason(connection))
                continue
            if not missing:
                health.working("topics")
            elif missing == before:
                health.failing("topics", f"{missing}; waiting for it")
            before = missing
    finally:
        if client is not None:
            await close_admin(client)


async def _reason(connection: Connection) -> str:
    """As ``why_unreachable``; a refused login is a reason too, for while running it may be right again later."""
    try:
        return await why_unreachable(connection)
    except WrongSetting as refusal:
        return str(refusal)


def refuse_compacted(limits: Mapping[str, TopicLimits], dead_letter_topic: str) -> None:
    """Raises WrongSetting where the dead-letter topic is known to be compacted, and so keeps one record of each key."""
    if limits[dead_letter_topic].is_compacted:
        raise WrongSetting(compacted_dead_letters(dead_letter_topic))


def compacted_dead_letters(topic: str) -> str:
    return (
        f"dead_letter_topic: topic {topic} is compacted, so that it takes no dead letter without a key and deletes older "
        "ones of the same key; set its cleanup.policy to delete"
    )


async def read_limits(connection: Connection, names: Iterable[str]) -> dict[str, TopicLimits]:
    """The limits of topics as they are now. Raises what is in UNREACHABLE."""
    names = list(names)
    client = admin_client(connection, names)
    try:
        async with asyncio.timeout(connection.request_timeout_s):
            await client.start()
            return await topic_limits(client, names)
    finally:
        await close_admin(client)


async def missing_topics(client: AIOKafkaAdminClient, topics: Mapping[str, Iterable[str]]) -> str:
    """What is wrong with topics, by role (``{"input_topics": [...], …}``), as a sentence; empty if all can be used."""
    roles = {name: role for role, names in topics.items() for name in names}
    codes = {topic["topic"]: topic["error_code"] for topic in await client.describe_topics(list(roles))}
    troubles = [
        f"{role}: topic {name} {_TOPIC_TROUBLES.get(code, f'cannot be used yet (Kafka error {code})')}"
        for name, role in roles.items()
        if (code := codes.get(name, 3)) not in (0, 5)  # 5: a partition has no leader at the moment
    ]
    return "; ".join(troubles)


async def matching_topics(client: AIOKafkaAdminClient, pattern: str) -> tuple[str, ...]:
    """The topics that match the setting ``input_pattern``, in order, without Kafka's own and those this user may not see."""
    return matching(pattern, await topic_names(client))


def matching(pattern: str, names: Iterable[str]) -> tuple[str, ...]:
    """The names that match the setting ``input_pattern``, in order."""
    return tuple(sorted(filter(whole_name(pattern).match, names)))


def no_match(pattern: str) -> str:
    return f"input_pattern: no topic has a name that matches {pattern!r}"


async def topic_limits(client: AIOKafkaAdminClient, names: list[str]) -> dict[str, TopicLimits]:
    """Limits of topics; Kafka's defaults where this user may not read them or the broker cannot tell."""
    limits = dict.fromkeys(names, TopicLimits())
    try:
        answers = await client.describe_configs([ConfigResource(ConfigResourceType.TOPIC, name) for name in names])
    except KafkaError:
        return limits
    for answer in answers:
        for error_code, _, _, name, entries, *_ in answer.resources:
            if error_code == 0:
                limits[name] = _parsed_limits({entry[0]: entry[1] for entry in entries})
    return limits


def _parsed_limits(config: Mapping[str, str | None]) -> TopicLimits:
    default = TopicLimits()

    def number(name: str, otherwise: int) -> int:
        return int(config.get(name) or otherwise)

    return TopicLimits(
        max_message_bytes=number("max.message.bytes", default.max_message_bytes),
        timestamp_before_max_ms=number("message.timestamp.before.max.ms", NO_LIMIT),
        timestamp_after_max_ms=number("message.timestamp.after.max.ms", NO_LIMIT),  # older brokers have none
        is_log_append_time=config.get("message.timestamp.type") == "LogAppendTime",
        is_compacted="compact" in (config.get("cleanup.policy") or ""),
        retention_ms=_retention_ms(config),
        is_known=True,
    )


def _retention_ms(config: Mapping[str, str | None]) -> int:
    retention_ms = int(config.get("retention.ms") or -1)
    is_by_producer = config.get("message.timestamp.type") != "LogAppendTime"
    is_deleted = "delete" in (config.get("cleanup.policy") or "") and is_by_producer and retention_ms >= 0
    return retention_ms if is_deleted else NO_LIMIT
