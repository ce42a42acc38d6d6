"""``sentiment-worker check``: whether settings, model, brokers and machine are fit for ``run``. It only asks."""

import asyncio
import errno
import http.client
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import GroupCoordinatorNotAvailableError

from worker.commands.kafka_connection import kafka_connection
from worker.errors import UserError, WrongSetting
from worker.http.server import SERVER
from worker.kafka.aiokafka_compat.metadata import known_brokers
from worker.kafka.backlog import backlog, valid_offsets
from worker.kafka.clients import admin_client, stop_client
from worker.kafka.connection import UNREACHABLE, Backoff, Connection
from worker.kafka.consumer import Consumer
from worker.kafka.diagnosis import why_unreachable
from worker.kafka.permissions import Permissions
from worker.kafka.topics import (
    NO_LIMIT,
    TopicLimits,
    compacted_dead_letters,
    matching_topics,
    missing_topics,
    no_match,
    read_limits,
    topic_limits,
)
from worker.printable import printable
from worker.runtime.file_descriptors import check_limit, raise_limit
from worker.runtime.tasks import within
from worker.settings import RunSettings
from worker.telemetry.tracing import refuse_without_the_extra

FREE_BYTES: Final = 1 << 30  # for a checkpoint of the hub and its export
ANSWER_S: Final = 2.0  # for whoever has the HTTP port
Verdict = Literal["ok", "warn", "fail"]


class Finding(NamedTuple):
    """One line: what was looked at, how it is, and if it is not well what to do."""

    subject: str
    verdict: Verdict
    said: str
    exit_code: int = 1
    """Where it fails: 2 for a wrong setting."""

    def __str__(self) -> str:
        return f"{self.verdict:<5} {self.subject:<12} {printable(self.said)}"


def run(settings: RunSettings) -> int:
    """Prints a line for each thing looked at, as soon as it is known. Blocks for as long as a model takes to load.

    Answers with 0 where nothing fails, 2 where a setting is wrong, credentials among them, else 1.
    """
    return asyncio.run(_run(settings))


def refused(error: WrongSetting) -> int:
    """Prints a line for each setting that is wrong, where there is nothing else to look at, and answers with 2."""
    return max(_printed(Finding("settings", "fail", said, error.exit_code)) for said in error.sentences)


async def _run(settings: RunSettings) -> int:
    return max([_printed(finding) async for finding in _findings(settings)])


def _printed(finding: Finding) -> int:
    sys.stdout.write(f"{finding}\n")
    sys.stdout.flush()
    return finding.exit_code if finding.verdict == "fail" else 0


async def _findings(settings: RunSettings) -> AsyncIterator[Finding]:
    connection = None
    wrong = []
    try:
        connection = kafka_connection(settings)
    except WrongSetting as error:
        wrong.append(_wrong("settings", error))
    try:
        if settings.tracing == "otel":
            refuse_without_the_extra()
    except WrongSetting as error:
        wrong.append(_wrong("settings", error))
    for finding in wrong or [Finding("settings", "ok", "they are valid, and fit together")]:
        yield finding
    for doubt in settings.exposures():
        yield Finding("security", "warn", doubt)
    yield _disk()
    yield await asyncio.to_thread(_port, settings.http_host, settings.http_port)
    yield await asyncio.to_thread(_model, settings)
    if connection:
        async for finding in _kafka(settings, connection):
            yield finding


def _wrong(subject: str, error: WrongSetting) -> Finding:
    return Finding(subject, "fail", str(error), error.exit_code)


# The machine.


def _disk() -> Finding:
    """Where checkpoints of the hub and exports of them are kept."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = next(each for each in (home, *home.parents) if each.exists())
    free = shutil.disk_usage(folder).free
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        advice = "set XDG_CACHE_HOME to a folder that can be, or every start exports anew"
        return Finding("disk", "warn", f"the cache folder {home} cannot be written ({error.strerror}); {advice}")
    if free < FREE_BYTES:
        return Finding("disk", "warn", f"{home} has {free >> 20} MiB left; a checkpoint and its export want 1 GiB")
    return Finding("disk", "ok", f"{home} can be written and has {free >> 30} GiB left")


def _port(host: str, port: int) -> Finding:
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE and _is_a_worker(host, port):
            taken = "is a sentiment-worker's that runs; one more on this machine needs another http_port"
            return Finding("http", "warn", f"{host}:{port} {taken}")
        return Finding("http", "fail", f"cannot listen on {host}:{port} ({error.strerror}); set http_host or http_port")
    return Finding("http", "ok", f"{host}:{port} is free")


def _is_a_worker(host: str, port: int) -> bool:
    """Whether a sentiment-worker answers there, be it alive or not."""
    connection = http.client.HTTPConnection(host, port, timeout=ANSWER_S)
    try:
        connection.request("GET", "/livez")
        return connection.getresponse().getheader("Server") == SERVER
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _model(settings: RunSettings) -> Finding:
    from worker.commands.load_model import load_from_settings  # noqa: PLC0415 - torch takes seconds, and the lines before it do not

    try:
        model = load_from_settings(settings)
    except UserError as error:  # brokers and topics are worth a look all the same
        return Finding("model", "fail", str(error))
    sentiment, _ = model.score(["Хорошо, спасибо."])[0]
    if sentiment is None:
        return Finding("model", "fail", f"{model.name} answers a plain text with what is no number; take another one")
    if model.warning:
        return Finding("model", "warn", model.warning)
    return Finding("model", "ok", f"{model.name} on {model.device}, {model.dtype}")


# Kafka.


async def _kafka(settings: RunSettings, connection: Connection) -> AsyncIterator[Finding]:
    admin = admin_client(connection, (*settings.topics, settings.output_topic, settings.dead_letter_topic))
    try:
        await within(connection.request_timeout_s, admin.start())
    except UNREACHABLE as error:
        yield await _away(connection, error)
        return
    try:
        async with asyncio.timeout(4 * connection.request_timeout_s):
            yield Finding("brokers", "ok", f"{known_brokers(admin)} at {', '.join(connection.bootstrap_servers)}")
            async for finding in _topics(settings, connection, admin):
                yield finding
    except UNREACHABLE as error:
        yield await _away(connection, error)
    finally:
        await within(5, admin.close())


async def _away(connection: Connection, error: BaseException) -> Finding:
    try:
        why = await why_unreachable(connection)
    except WrongSetting as refusal:
        return _wrong("brokers", refusal)
    where = ", ".join(connection.bootstrap_servers)
    return Finding(
        "brokers", "fail", why or f"{where} did not answer all questions ({type(error).__name__}); try again"
    )


async def _topics(settings: RunSettings, connection: Connection, admin: AIOKafkaAdminClient) -> AsyncIterator[Finding]:
    topics = tuple(dict.fromkeys(settings.topics))
    if settings.input_pattern:
        topics = await matching_topics(admin, settings.input_pattern)
        if not topics:
            yield Finding(
                "topics", "fail", f"{no_match(settings.input_pattern)}; create one, or look for its Describe ACL"
            )
            return
    roles: dict[str, Sequence[str]] = {
        "input_topics": topics,
        "output_topic": (settings.output_topic,),
        "dead_letter_topic": (settings.dead_letter_topic,),
    }
    missing = await missing_topics(admin, roles)
    if missing:
        yield Finding("topics", "fail", f"{missing}; create it, or name another")
        return
    names = [name for group in roles.values() for name in group]
    described = {topic["topic"]: topic for topic in await admin.describe_topics(names)}
    yield Finding("topics", "ok", ", ".join(f"{name} ({len(described[name]['partitions'])})" for name in names))
    for name in names:
        for finding in _partitions(described[name], await _config(admin, name), is_output=name in names[-2:]):
            yield finding
    for finding in _compacted(await topic_limits(admin, names), settings):
        yield finding
    partitions = sum(len(described[name]["partitions"]) for name in roles["input_topics"])
    yield _files(partitions, described.values(), exactly_once=settings.delivery == "exactly-once")
    yield await _members(settings.group_id, admin, partitions)
    async for finding in _retention(settings, connection, [described[name] for name in topics]):
        yield finding
    yield await _backlog(settings, connection, topics)
    async for finding in _permissions(settings, connection, roles):
        yield finding


def _partitions(topic: Mapping[str, Any], config: Mapping[str, str | None], *, is_output: bool) -> Iterator[Finding]:
    name = topic["topic"]
    leaderless = [each["partition"] for each in topic["partitions"] if each["leader"] < 0]
    replicas = min(len(each["replicas"]) for each in topic["partitions"])
    if leaderless:
        yield Finding(
            "partitions", "fail", f"{name} has partitions without a leader: {leaderless}; look at its brokers"
        )
    elif replicas == 1:
        yield Finding(
            "replicas", "warn", f"{name} has one replica a partition, and is lost with its broker; 3 are usual"
        )
    elif is_output and int(config.get("min.insync.replicas") or 1) < 2:
        yield Finding(
            "replicas",
            "warn",
            f"{name} has min.insync.replicas 1: what is acknowledged may be lost with a broker; set 2",
        )
    else:
        yield Finding("replicas", "ok", f"{name} has {replicas} a partition")


def _files(partitions: int, topics: Iterable[Mapping[str, Any]], *, exactly_once: bool) -> Finding:
    """Where one worker has all input partitions, as it has when the others are gone."""
    raise_limit()  # as a worker does
    brokers = {node for topic in topics for partition in topic["partitions"] for node in partition["replicas"]}
    is_enough, files = check_limit(partitions, len(brokers), exactly_once=exactly_once)
    return Finding("files", "ok" if is_enough else "warn", files)


def _compacted(limits: Mapping[str, TopicLimits], settings: RunSettings) -> Iterator[Finding]:
    if limits[settings.output_topic].is_compacted:
        advice = "results without a key become dead letters (key_required)"
        yield Finding("compaction", "warn", f"{settings.output_topic} is compacted: {advice}")
    if limits[settings.dead_letter_topic].is_compacted:
        yield Finding("compaction", "fail", compacted_dead_letters(settings.dead_letter_topic))


async def _config(admin: AIOKafkaAdminClient, name: str) -> dict[str, str | None]:
    """A topic's settings; none where this user may not read them."""
    answers = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, name)])
    return {entry[0]: entry[1] for answer in answers for resource in answer.resources for entry in resource[4]}


async def _members(group: str, admin: AIOKafkaAdminClient, partitions: int) -> Finding:
    answers = await _described(group, admin)
    members = sum(len(found[5]) for answer in answers for found in answer.groups)
    if members >= partitions:
        return Finding(
            "workers",
            "warn",
            f"group {group} has {members} members for {partitions} partitions: one more would be idle",
        )
    return Finding("workers", "ok", f"group {group} has {members} members, and work for up to {partitions}")


async def _backlog(settings: RunSettings, connection: Connection, topics: Sequence[str]) -> Finding:
    try:
        found = await backlog(
            connection,
            topics,
            group_id=settings.group_id,
            auto_offset_reset=settings.auto_offset_reset,
            isolation_level=settings.isolation_level,
        )
    except UNREACHABLE as error:  # such as a permission that is missing, which has a line of its own
        said = f"where group {settings.group_id} would begin cannot be asked ({type(error).__name__})"
        return Finding("offsets", "warn", f"{said}; look at the permissions, or try again")
    return Finding("offsets", "warn" if found.is_all_over_again or found.recreated else "ok", str(found))


async def _described(group: str, admin: AIOKafkaAdminClient) -> Any:
    """The first who ever asks for a group waits until Kafka has made the topic for their offsets."""
    backoff = Backoff()
    while True:
        try:
            return await admin.describe_consumer_groups([group])
        except GroupCoordinatorNotAvailableError:
            await backoff.wait()


async def _retention(
    settings: RunSettings, connection: Connection, topics: Iterable[Mapping[str, Any]]
) -> AsyncIterator[Finding]:
    """Something where results would have timestamps that their topic no longer keeps, or where nobody can tell."""
    name = settings.output_topic
    keeps_ms = (await read_limits(connection, [name]))[name].retention_ms
    if settings.result_timestamp == "now" or keeps_ms == NO_LIMIT:
        return
    tps = [TopicPartition(topic["topic"], each["partition"]) for topic in topics for each in topic["partitions"]]
    consumer = Consumer(**connection.options(), group_id=settings.group_id, enable_auto_commit=False)
    try:
        await within(connection.request_timeout_s, consumer.start())
        consumer.assign(tps)
        oldest = int(time.time() * 1000) - keeps_ms
        old = await within(
            connection.request_timeout_s, _unread_before(consumer, tps, oldest, settings.auto_offset_reset)
        )
    except UNREACHABLE as error:
        yield Finding("retention", "warn", f"how old the input is cannot be asked ({type(error).__name__}); try again")
    else:
        if old:
            yield Finding(
                "retention",
                "warn",
                f"up to {old} records to be read are older than {name} keeps its own ({keeps_ms / 3_600_000:.4g} h): Kafka "
                "may delete their results at once; set result_timestamp to now, or raise its retention.ms",
            )
    finally:
        await stop_client(consumer, "consumer", 5)


async def _unread_before(consumer: Consumer, tps: list[TopicPartition], moment: int, otherwise: str) -> int:
    """How many records before a moment, in ms, the group has not read: those before the first that is as new."""
    begins, ends = await consumer.beginning_offsets(tps), await consumer.end_offsets(tps)
    committed, _ = await valid_offsets(consumer, tps)
    found = await consumer.offsets_for_times(dict.fromkeys(tps, moment))
    resets = begins if otherwise == "earliest" else ends
    unread = 0
    for tp in tps:
        begin = committed.get(tp, resets[tp])
        unread += max(0, (found[tp].offset if found.get(tp) else ends[tp]) - max(begin, begins[tp]))
    return unread


async def _permissions(
    settings: RunSettings, connection: Connection, roles: Mapping[str, Iterable[str]]
) -> AsyncIterator[Finding]:
    permissions = Permissions(connection)
    outputs = (settings.output_topic, settings.dead_letter_topic)
    try:
        await permissions.start(name for group in roles.values() for name in group)
        asked = [(f"READ on topic {name}", await permissions.may_read(name)) for name in roles["input_topics"]]
        asked += [(f"WRITE on topic {name}", await permissions.may_write(name)) for name in outputs]
        asked.append((f"READ on group {settings.group_id}", await permissions.may_join(settings.group_id)))
        if settings.delivery == "exactly-once":
            for name in roles["input_topics"]:
                ids = f"{settings.group_id}/{name}/0"
                asked.append(
                    (f"WRITE on transactional id {ids}", await permissions.may_transact(ids, settings.output_topic))
                )
    finally:
        await permissions.close()
    lacking = [what for what, is_allowed in asked if not is_allowed]
    if lacking:
        yield Finding("permissions", "fail", f"missing {'; '.join(lacking)}; add the ACL")
    else:
        yield Finding("permissions", "ok", "; ".join(what for what, _ in asked))
