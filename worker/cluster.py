"""The Kafka cluster: how to connect to it, which topics it has, and what they accept."""

import asyncio
import functools
import logging
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import aiokafka.admin.client
import aiokafka.client
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.conn import AIOKafkaConnection, CloseReason, collect_hosts, create_conn
from aiokafka.errors import (
    AuthenticationFailedError,
    AuthenticationMethodNotSupported,
    IllegalSaslStateError,
    KafkaConnectionError,
    KafkaError,
    SaslAuthenticationFailed,
    UnsupportedSaslMechanismError,
)
from aiokafka.helpers import create_ssl_context
from aiokafka.protocol.metadata import MetadataRequest

from worker.aiokafka_compat import end_remains, topic_names
from worker.handshake import tls_failure, tls_sentence, wants_tls
from worker.health import Health
from worker.settings import ConnectionSettings, WrongSetting, revealed, split_names, whole_name
from worker.tasks import cancelled, within
from worker.unpacking import bound_unpacking

log = logging.getLogger(__name__)
Found = TypeVar("Found")

# aiokafka asks the broker to create each topic that it names; a worker must never do that by accident.
_metadata_request = functools.partial(MetadataRequest, allow_auto_topic_creation=False)
aiokafka.client.MetadataRequest = _metadata_request
aiokafka.admin.client.MetadataRequest = _metadata_request
bound_unpacking()


def _while_it_is_open(send: Callable[..., Any]) -> Callable[..., Any]:
    """uvloop raises RuntimeError where a connection that has just been reset is written to; aiokafka knows OSError alone."""

    @functools.wraps(send)
    def checked(connection: AIOKafkaConnection, *arguments: Any, **options: Any) -> Any:
        if connection._writer is not None and connection._writer.is_closing():
            connection.close(reason=CloseReason.CONNECTION_BROKEN)
            raise KafkaConnectionError(f"Connection at {connection.host}:{connection.port} broken")
        return send(connection, *arguments, **options)

    return checked


AIOKafkaConnection.send = _while_it_is_open(AIOKafkaConnection.send)
AIOKafkaConnection._send_sasl_token = _while_it_is_open(AIOKafkaConnection._send_sasl_token)

FIRST_BACKOFF_S: Final = 0.25
LONGEST_BACKOFF_S: Final = 5.0
NO_LIMIT: Final = 2**63 - 1
WATCH_S: Final = 3.0
UNREACHABLE: Final = (KafkaError, OSError, asyncio.TimeoutError)

_REFUSED_LOGIN = (
    AuthenticationFailedError,
    AuthenticationMethodNotSupported,
    IllegalSaslStateError,
    SaslAuthenticationFailed,
    UnsupportedSaslMechanismError,
)
_TOPIC_TROUBLES = {3: "does not exist", 17: "has a name that Kafka does not allow", 29: "may not be read about (ACL)"}


@dataclass(frozen=True)
class Connection:
    """How every client of this process connects. ``request_timeout_ms`` bounds one request."""

    bootstrap_servers: tuple[str, ...]
    client_id: str = "sentiment-worker"
    request_timeout_ms: int = 30_000
    security_protocol: str = "PLAINTEXT"
    sasl_mechanism: str | None = None
    sasl_username: str | None = None
    sasl_password: str | None = field(default=None, repr=False)
    ssl_context: ssl.SSLContext | None = field(default=None, repr=False)

    @classmethod
    def as_set(cls, settings: ConnectionSettings) -> "Connection":
        """By the settings that commands with Kafka share. Reads certificates. Raises WrongSetting."""

        def path(name: str) -> str | None:
            value = getattr(settings, name)
            return str(value) if value else None

        context = None
        if settings.security_protocol.endswith("SSL"):
            context = tls_context(
                path("ssl_cafile"), path("ssl_certfile"), path("ssl_keyfile"), revealed(settings.ssl_key_password)
            )
        return cls(
            bootstrap_servers=split_names(settings.bootstrap_servers),
            client_id=settings.client_id,
            request_timeout_ms=settings.request_timeout_ms,
            security_protocol=settings.security_protocol,
            sasl_mechanism=settings.sasl_mechanism,
            sasl_username=settings.sasl_username,
            sasl_password=revealed(settings.sasl_password),
            ssl_context=context,
        )

    @property
    def request_timeout_s(self) -> float:
        return self.request_timeout_ms / 1000

    def options(self) -> dict[str, Any]:
        """Arguments for aiokafka's clients."""
        options: dict[str, Any] = {
            "bootstrap_servers": list(self.bootstrap_servers),
            "client_id": self.client_id,
            "request_timeout_ms": self.request_timeout_ms,
            "security_protocol": self.security_protocol,
            "ssl_context": self.ssl_context,
        }
        if self.sasl_mechanism:
            options |= {
                "sasl_mechanism": self.sasl_mechanism,
                "sasl_plain_username": self.sasl_username,
                "sasl_plain_password": self.sasl_password,
            }
        return options


@dataclass(frozen=True)
class TopicLimits:
    """What a topic accepts, and how long it keeps it, as Kafka's settings of these names; the defaults are Kafka's own.

    ``is_known``: the broker has told them. Where it has not, nothing is refused in its name. ``retention_ms`` is the age,
    by its own timestamp, at which a record is deleted: NO_LIMIT where it never is, or where the broker dates it.
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
        """Whether timestamps have no more than one limit: old ones or future ones are all taken."""
        return NO_LIMIT in (self.timestamp_before_max_ms, self.timestamp_after_max_ms)

    def excess_ms(self, timestamp: int) -> float:
        """How far beyond the limits a timestamp is by this machine's clock; below 0: within them."""
        now = time.time() * 1000
        return max(timestamp - now - self.timestamp_after_max_ms, now - self.timestamp_before_max_ms - timestamp)


class Backoff:
    """Waits between tries, doubling up to a bound."""

    def __init__(self) -> None:
        self._next_s = FIRST_BACKOFF_S

    async def wait(self) -> None:
        await asyncio.sleep(self._next_s)
        self._next_s = min(self._next_s * 2, LONGEST_BACKOFF_S)


def tls_context(cafile: str | None, certfile: str | None, keyfile: str | None, password: str | None) -> ssl.SSLContext:
    """A TLS context that checks the brokers' certificates and names. Raises WrongSetting."""
    try:
        context: ssl.SSLContext = create_ssl_context(
            cafile=cafile,
            certfile=certfile,
            keyfile=keyfile,
            password=password or "",  # with None OpenSSL would ask for it on the terminal
        )
    except (ssl.SSLError, OSError, ValueError) as error:
        raise WrongSetting(f"ssl_cafile, ssl_certfile or ssl_keyfile cannot be used: {error}") from None
    return context


async def wait_until_usable(
    connection: Connection, topics: Mapping[str, Iterable[str]], health: Health
) -> dict[str, TopicLimits]:
    """Waits for the brokers and for every topic, by its role (``{"input_topics": [...], …}``), and creates none.

    Answers with the limits of each topic. What is missing is told once. Raises WrongSetting where the brokers refuse
    login or certificate.
    """

    names = [name for group in topics.values() for name in group]

    async def look(client: AIOKafkaAdminClient) -> tuple[str, dict[str, TopicLimits]]:
        missing = await missing_topics(client, topics)
        names = [name for group in topics.values() for name in group]
        return missing, {} if missing else await topic_limits(client, names)

    return await _until_found(connection, health, look, names)


async def wait_for_a_match(connection: Connection, pattern: str, health: Health) -> tuple[str, ...]:
    """Waits until there are topics that match the setting ``input_pattern``, and answers with them. Raises WrongSetting."""

    async def look(client: AIOKafkaAdminClient) -> tuple[str, tuple[str, ...]]:
        found = await matching_topics(client, pattern)
        return "" if found else no_match(pattern), found

    return await _until_found(connection, health, look)


async def _until_found(
    connection: Connection,
    health: Health,
    look: Callable[[AIOKafkaAdminClient], Awaitable[tuple[str, Found]]],
    names: Iterable[str] = (),
) -> Found:
    """Looks until nothing is missing: ``look`` answers with what is, as a sentence, and with what it has found."""
    backoff = Backoff()
    while True:
        client = admin_client(connection, names)
        try:
            async with asyncio.timeout(connection.request_timeout_s):
                await client.start()
                missing, found = await look(client)
                health.well("kafka")
                if not missing:
                    health.well("topics")
                    return found
            health.trouble("topics", f"{missing}; waiting for it")
        except UNREACHABLE as error:
            hint = await refuse_wrong_credentials(connection)
            health.trouble("kafka", unreachable(connection, error) + hint)
        finally:
            await _close(client)
        await backoff.wait()


async def watch_topics(
    connection: Connection, topics: Mapping[str, Iterable[str]], health: Health, *, every_s: float = WATCH_S
) -> None:
    """Tells health while a topic that is in use, by its role, does not exist or may not be used. Does not end.

    Two answers in a row have to say so, for a broker that has just started may not know of a topic yet.
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
            except UNREACHABLE:  # others tell of it
                if client is not None:
                    await _close(client)
                client = None
                continue
            if not missing:
                health.well("topics")
            elif missing == before:
                health.trouble("topics", f"{missing}; waiting for it")
            before = missing
    finally:
        if client is not None:
            await _close(client)


def refuse_compacted(limits: Mapping[str, TopicLimits], dead_letter_topic: str) -> None:
    """Raises WrongSetting where the topic for dead letters is known to keep one record of each key alone."""
    if limits[dead_letter_topic].is_compacted:
        raise WrongSetting(compacted_dead_letters(dead_letter_topic))


def compacted_dead_letters(topic: str) -> str:
    return (
        f"dead_letter_topic: topic {topic} is compacted, so that it takes no dead letter without a key and deletes older "
        "ones of the same key; set its cleanup.policy to delete"
    )


def admin_client(connection: Connection, names: Iterable[str]) -> AIOKafkaAdminClient:
    """Not started. It asks for these topics alone when a broker is away, and not for all of the cluster's each time."""
    client = AIOKafkaAdminClient(**connection.options())
    if names := set(names):
        client._client.set_topics(names)
    return client


async def read_limits(connection: Connection, names: Iterable[str]) -> dict[str, TopicLimits]:
    """The limits of topics as they are now. Raises what is in UNREACHABLE."""
    names = list(names)
    client = admin_client(connection, names)
    try:
        async with asyncio.timeout(connection.request_timeout_s):
            await client.start()
            return await topic_limits(client, names)
    finally:
        await _close(client)


async def stopped(client: Any, what: str, timeout_s: float) -> None:
    """Stops one of aiokafka's clients, within ``timeout_s``, and ends what that leaves behind; raises nothing.

    As a task of its own, for aiokafka lets a CancelledError of its inner tasks out.
    """
    stopping = asyncio.create_task(client.stop())
    try:
        await asyncio.wait({stopping}, timeout=timeout_s)
        if not stopping.done():
            log.warning("the %s did not stop in time", what)
        elif not stopping.cancelled() and stopping.exception():
            log.warning("the %s did not stop well", what, extra={"error": type(stopping.exception()).__name__})
    finally:
        await cancelled([stopping])
        await end_remains(client)


def unreachable(connection: Connection, error: BaseException) -> str:
    """Why the brokers cannot be used at the moment, for the log."""
    return f"waiting for Kafka at {','.join(connection.bootstrap_servers)} ({type(error).__name__})"


async def missing_topics(client: AIOKafkaAdminClient, topics: Mapping[str, Iterable[str]]) -> str:
    """What is wrong with topics, by role (``{"input_topics": [...], …}``); nothing if they can be used."""
    roles = {name: role for role, names in topics.items() for name in names}
    found = {topic["topic"]: topic["error_code"] for topic in await client.describe_topics(list(roles))}
    troubles = [
        f"{role}: topic {name} {_TOPIC_TROUBLES.get(code, f'cannot be used yet (Kafka error {code})')}"
        for name, role in roles.items()
        if (code := found.get(name, 3)) not in (0, 5)  # 5: a partition has no leader at the moment
    ]
    return "; ".join(troubles)


async def matching_topics(client: AIOKafkaAdminClient, pattern: str) -> tuple[str, ...]:
    """The topics that match the setting ``input_pattern`` and that this user may know of, in order; Kafka's own never do."""
    return matching(pattern, await topic_names(client._client))


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


async def refuse_wrong_credentials(connection: Connection) -> str:
    """Raises WrongSetting if a broker can be reached and refuses who we are, or is not who it should be.

    aiokafka's own start hides that behind "unable to bootstrap". Answers with a hint for the log, or nothing.
    """
    hint = ""
    options = connection.options()
    for host, port, _ in collect_hosts(options.pop("bootstrap_servers")):
        try:
            connected = await within(connection.request_timeout_s, create_conn(host, port, **options))
        except _REFUSED_LOGIN as error:
            raise WrongSetting(
                f"the broker {host}:{port} refuses the login of sasl_username {connection.sasl_username!r} by "
                f"{connection.sasl_mechanism} ({type(error).__name__}); check the user, the password and the mechanism"
            ) from None
        except ssl.SSLError as error:
            raise WrongSetting(tls_sentence(f"{host}:{port}", error)) from None
        except UNREACHABLE:
            hint = hint or await _refuse_wrong_tls(connection, host, port)
            continue
        connected.close()
    return hint


async def _refuse_wrong_tls(connection: Connection, host: str, port: int) -> str:
    """Raises WrongSetting if it is TLS that a broker ends the connection for; a hint where that is not certain."""
    if connection.ssl_context:
        error = await tls_failure(host, port, connection.ssl_context, connection.request_timeout_s)
        if isinstance(error, ssl.SSLEOFError | ConnectionResetError):  # it may also be a broker that is just starting
            return f"; does it speak TLS there, as security_protocol {connection.security_protocol} says?"
        if error:
            raise WrongSetting(tls_sentence(f"{host}:{port}", error))
    elif await wants_tls(host, port, connection.request_timeout_s):
        raise WrongSetting(
            f"the broker {host}:{port} wants TLS, and security_protocol is {connection.security_protocol}; it should be "
            "SSL or SASL_SSL"
        )
    return ""


async def _close(client: AIOKafkaAdminClient) -> None:
    try:
        await within(5, client.close())
    except UNREACHABLE:
        await end_remains(client)
