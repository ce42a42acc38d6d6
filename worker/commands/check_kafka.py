"""What ``sentiment-worker check`` asks the brokers: topics, group, permissions, backlog. It only asks."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence

from worker.commands.finding import Finding, wrong_setting
from worker.errors import WrongSetting
from worker.kafka.backlog import backlog
from worker.kafka.bounded_run import Until, check_group
from worker.kafka.connection import UNREACHABLE, Connection, error_name
from worker.kafka.diagnosis import why_unreachable
from worker.kafka.inspector import Inspector, TopicDescription, unread_older_than
from worker.kafka.permissions import Permissions, add_the_acl
from worker.kafka.topics import NO_LIMIT, TopicLimits, compacted_dead_letters, no_match
from worker.kafka.transactional_sink import TRANSACTION_TIMEOUT_S, new_transactional_id
from worker.printable import counted
from worker.runtime.file_descriptors import check_limit, raise_limit
from worker.runtime.tasks import within
from worker.settings.run import RunSettings
from worker.telemetry.health import Health


async def kafka_findings(settings: RunSettings, connection: Connection) -> AsyncIterator[Finding]:
    inspector = Inspector.of(connection, (*settings.topics, settings.output_topic, settings.dead_letter_topic))
    try:
        brokers = await inspector.start(connection.request_timeout_s)
        yield await _brokers(settings, connection, inspector, brokers)
        if settings.client_rack:
            yield await _rack(settings.client_rack, inspector)
        async with asyncio.timeout(4 * connection.request_timeout_s):
            async for finding in _topics(settings, connection, inspector):
                yield finding
    except UNREACHABLE as error:
        yield await _away(connection, error)
    finally:
        await inspector.close()


async def _brokers(settings: RunSettings, connection: Connection, inspector: Inspector, count: int) -> Finding:
    try:
        if settings.delivery == "exactly-once":
            await inspector.refuse_old_brokers()
    except WrongSetting as error:
        return wrong_setting("brokers", error)
    return Finding("brokers", "ok", f"{count} at {', '.join(connection.bootstrap_servers)}")


async def _rack(rack: str, inspector: Inspector) -> Finding:
    if why := await inspector.why_no_replica_in(rack):
        return Finding("rack", "warn", f"{why}: records are read from leaders, wherever those are")
    return Finding("rack", "ok", f"records are read from replicas in {rack}, where there are any")


async def _away(connection: Connection, error: BaseException) -> Finding:
    try:
        why = await why_unreachable(connection)
    except WrongSetting as refusal:
        return wrong_setting("brokers", refusal)
    where = ", ".join(connection.bootstrap_servers)
    return Finding("brokers", "fail", why or f"{where} did not answer all questions ({error_name(error)}); try again")


async def _topics(settings: RunSettings, connection: Connection, inspector: Inspector) -> AsyncIterator[Finding]:
    inputs = tuple(dict.fromkeys(settings.topics))
    if settings.input_pattern:
        inputs = await inspector.matching(settings.input_pattern)
        if not inputs:
            advice = "create one, or look for its Describe ACL"
            yield Finding("topics", "fail", f"{no_match(settings.input_pattern)}; {advice}")
            return
    missing = await inspector.missing(
        {
            "input_topics": inputs,
            "output_topic": [settings.output_topic],
            "dead_letter_topic": [settings.dead_letter_topic],
        }
    )
    if missing:
        yield Finding("topics", "fail", missing)
        return
    async for finding in _existing_topics(settings, connection, inspector, inputs):
        yield finding


async def _existing_topics(
    settings: RunSettings, connection: Connection, inspector: Inspector, inputs: Sequence[str]
) -> AsyncIterator[Finding]:
    """What is to be said of topics that are all there, and of the group that reads them."""
    outputs = (settings.output_topic, settings.dead_letter_topic)
    topics = await inspector.topics((*inputs, *outputs))
    yield Finding("topics", "ok", ", ".join(f"{topic.name} ({len(topic.partitions)})" for topic in topics))
    for topic in topics:
        yield _replicas(topic, is_output=topic.name in outputs)
    limits = await inspector.limits(outputs)
    for finding in _compacted(limits, settings):
        yield finding
    input_topics = topics[: len(inputs)]
    partitions = sum(len(topic.partitions) for topic in input_topics)
    yield _files(topics)
    yield await _members(settings.group_id, inspector, partitions)
    if settings.group_instance_id and await inspector.is_instance_id_taken(
        settings.group_id, settings.group_instance_id
    ):
        yield Finding("workers", "warn", _taken(settings.group_instance_id))
    too_old = await _retention(settings, connection, input_topics, limits[settings.output_topic].retention_ms)
    if too_old:
        yield too_old
    yield await _backlog(settings, connection, inputs)
    yield await _permissions(settings, connection, inputs, outputs)
    if settings.delivery == "exactly-once":  # afterwards, for Kafka creates its topics for the first who asks
        async for finding in _transactions(settings.group_id, inspector, inputs):
            yield finding


async def _transactions(group: str, inspector: Inspector, inputs: Sequence[str]) -> AsyncIterator[Finding]:
    """What is in the way of transactions."""
    if old := await inspector.open_old_transactions(group, inputs):
        yield Finding("transactions", "fail", _of_old_workers(old))
    longest_ms = await inspector.longest_transaction_ms()
    if longest_ms is not None and longest_ms < 1000 * TRANSACTION_TIMEOUT_S:
        short = f"the brokers' transaction.max.timeout.ms is {longest_ms:,}"
        yield Finding("transactions", "fail", f"{short}; set it to {1000 * TRANSACTION_TIMEOUT_S:,.0f} or more")
    for topic, replicas in (await inspector.internal_replicas()).items():
        if replicas == 1:
            one = f"{topic} has one replica a partition, and without its broker nothing is committed"
            yield Finding("replicas", "warn", f"{one}; 3 are usual")


def _replicas(topic: TopicDescription, *, is_output: bool) -> Finding:
    if topic.leaderless:
        leaderless = f"{topic.name} has partitions without a leader: {list(topic.leaderless)}"
        return Finding("partitions", "fail", f"{leaderless}; look at its brokers")
    if is_output and topic.in_sync < topic.min_insync_replicas:
        few = f"{counted(topic.in_sync, 'replica')} in sync, and min.insync.replicas {topic.min_insync_replicas}"
        return Finding("replicas", "fail", f"{topic.name} has {few}: brokers accept nothing for it; look at both")
    if topic.replicas == 1:
        one = f"{topic.name} has one replica a partition, and is lost with its broker"
        return Finding("replicas", "warn", f"{one}; 3 are usual")
    if is_output and topic.min_insync_replicas < 2:
        one = f"{topic.name} has min.insync.replicas 1: what is acknowledged may be lost with a broker"
        return Finding("replicas", "warn", f"{one}; set 2")
    return Finding("replicas", "ok", f"{topic.name} has {topic.replicas} a partition")


def _files(topics: Iterable[TopicDescription]) -> Finding:
    """Whether a worker may open the files for its connections to all brokers."""
    raise_limit()  # as a worker does
    brokers = frozenset[int]().union(*(topic.brokers for topic in topics))
    is_enough, sentence = check_limit(len(brokers))
    return Finding("files", "ok" if is_enough else "warn", sentence)


def _compacted(limits: Mapping[str, TopicLimits], settings: RunSettings) -> Iterator[Finding]:
    if limits[settings.output_topic].is_compacted:
        advice = "results without a key become dead letters (key_required)"
        yield Finding("compaction", "warn", f"{settings.output_topic} is compacted: {advice}")
    if limits[settings.dead_letter_topic].is_compacted:
        yield Finding("compaction", "fail", compacted_dead_letters(settings.dead_letter_topic))


async def _members(group: str, inspector: Inspector, partitions: int) -> Finding:
    members = await inspector.members(group)
    if members is None:
        lacking = add_the_acl(f"DESCRIBE on group {group}")
        return Finding("workers", "warn", f"how many members the group has is not told: {lacking}")
    if members >= partitions:
        have = f"{counted(members, 'member')} for {counted(partitions, 'partition')}"
        idle = f"group {group} has {have}: one more would be idle"
        return Finding("workers", "warn", idle)
    return Finding("workers", "ok", f"group {group} has {counted(members, 'member')}, and work for up to {partitions}")


def _taken(instance_id: str) -> str:
    return (
        f"a member of the group has the group_instance_id {instance_id}: if it is not the worker that this one replaces, it "
        "ends when this one starts; give each worker an id of its own"
    )


def _of_old_workers(transactional_ids: Sequence[str]) -> str:
    return (
        f"workers before 0.2.0 have open transactions, such as {transactional_ids[0]}: stop all of them, for they and newer "
        "ones cannot fence each other; brokers end what a killed one has left open after a minute"
    )


async def _backlog(settings: RunSettings, connection: Connection, topics: Sequence[str]) -> Finding:
    try:
        unread = await backlog(
            connection,
            topics,
            group_id=settings.group_id,
            auto_offset_reset=settings.auto_offset_reset,
            isolation_level=settings.isolation_level,
            since_ms=settings.since_ms,
        )
        if settings.until:
            until = Until(settings.group_id, settings.until_ms)
            await within(connection.request_timeout_s, check_group(connection, topics, until, Health()))
    except WrongSetting as error:
        return wrong_setting("offsets", error)
    except UNREACHABLE as error:  # such as a permission that is missing, which has a line of its own
        doubt = f"the brokers do not answer where group {settings.group_id} would begin ({error_name(error)})"
        return Finding("offsets", "warn", f"{doubt}; look at the permissions, or try again")
    return Finding("offsets", "warn" if unread.is_all_over_again or unread.recreated else "ok", str(unread))


async def _retention(
    settings: RunSettings, connection: Connection, topics: Iterable[TopicDescription], keeps_ms: int
) -> Finding | None:
    """A warning where results would have timestamps older than their topic keeps, or where the brokers do not answer."""
    if settings.result_timestamp == "now" or keeps_ms == NO_LIMIT:
        return None
    try:
        old = await unread_older_than(
            keeps_ms,
            connection,
            topics,
            group_id=settings.group_id,
            auto_offset_reset=settings.auto_offset_reset,
            since_ms=settings.since_ms,
        )
    except UNREACHABLE as error:
        doubt = f"the brokers do not answer how old the input is ({error_name(error)}); try again"
        return Finding("retention", "warn", doubt)
    if not old:
        return None
    sentence = (
        f"up to {counted(old, 'unread record')} may be older than {settings.output_topic} keeps its own "
        f"({keeps_ms / 3_600_000:.4g} h): Kafka may delete their results at once; set result_timestamp to now, or raise "
        "its retention.ms"
    )
    return Finding("retention", "warn", sentence)


async def _permissions(
    settings: RunSettings, connection: Connection, inputs: Sequence[str], outputs: Sequence[str]
) -> Finding:
    permissions = Permissions(connection)
    try:
        await permissions.start((*inputs, *outputs))
        answers = [(f"READ on topic {name}", await permissions.may_read(name)) for name in inputs]
        answers += [(f"WRITE on topic {name}", await permissions.may_write(name)) for name in outputs]
        answers.append((f"READ on group {settings.group_id}", await permissions.may_join(settings.group_id)))
        if settings.delivery == "exactly-once":
            transactional_id = new_transactional_id(settings.group_id, settings.group_instance_id)
            may_transact = await permissions.may_transact(transactional_id, settings.output_topic)
            answers.append((f"WRITE on transactional ids with the prefix {settings.group_id}/", may_transact))
    finally:
        await permissions.close()
    lacking = [permission for permission, is_given in answers if not is_given]
    if lacking:
        return Finding("permissions", "fail", add_the_acl(*lacking))
    return Finding("permissions", "ok", "; ".join(permission for permission, _ in answers))
