"""The Kafka cluster: how to connect to it, which topics it has, and what they accept."""

import asyncio
import contextlib
import logging
import math
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.conn import AIOKafkaConnection, collect_hosts, create_conn
from aiokafka.errors import (
    AuthenticationFailedError,
    AuthenticationMethodNotSupported,
    IllegalSaslStateError,
    KafkaError,
    SaslAuthenticationFailed,
    UnsupportedSaslMechanismError,
)
from aiokafka.helpers import create_ssl_context
from aiokafka.protocol.admin import SaslHandShakeRequest

from worker.errors import UserError, WrongSetting
from worker.kafka.aiokafka_compat import creating_no_topic, end_remains, topic_names, use_topics
from worker.kafka.broker_probe import Listener, listener_at, tls_sentence
from worker.runtime.tasks import cancelled, within
from worker.settings import ConnectionSettings, revealed, split_names, whole_name
from worker.telemetry.health import Health

log = logging.getLogger(__name__)
Found = TypeVar("Found")

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
PROBE_S: Final = 5.0  # for a connection that only asks what is there
MOST_ADVERTISED: Final = 8  # brokers whose addresses are looked at
_ADVICE: Final = {
    Listener.UNKNOWN: "check its spelling and this machine's DNS",
    Listener.REFUSED: "check host and port, and whether the broker runs",
    Listener.NOWHERE: "check the address, and what is on the way to it",
    Listener.NO_TLS: "check whether security_protocol {protocol} is right for this port",
    Listener.HTTP: "check the port",
    Listener.SILENT: "check the port, and whether the broker is well",
    Listener.CLOSING: "check the port, and whether the broker is well",
}
_TOPIC_TROUBLES = {3: "does not exist", 17: "has a name that Kafka does not allow", 29: "may not be read about (ACL)"}


class BrokersAway(UserError):
    """No broker can be used, for longer than a command waits; the message says why."""

    exit_code = 1


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
    certificates = "it should be a PEM file of certificates (-----BEGIN CERTIFICATE-----)"
    with _or_wrong("ssl_cafile", cafile, certificates):
        context: ssl.SSLContext = create_ssl_context(cafile=cafile)
    if certfile:
        with _or_wrong("ssl_certfile", certfile, certificates):
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(certfile)
        key = "it should be a PEM file with the key of ssl_certfile, and WORKER_SSL_KEY_PASSWORD that key's password, if any"
        with _or_wrong("ssl_keyfile" if keyfile else "ssl_certfile", keyfile or certfile, key):
            context.load_cert_chain(certfile, keyfile, password or "")  # with None OpenSSL would ask on the terminal
    return context


@contextlib.contextmanager
def _or_wrong(name: str, file: str | None, wanted: str) -> Iterator[None]:
    """Raises WrongSetting where a file of TLS cannot be used; OpenSSL's own words name neither the file nor its fault."""
    try:
        yield
    except (OSError, ValueError) as error:  # an SSLError is an OSError
        unreadable = not isinstance(error, ssl.SSLError) and isinstance(error, OSError)
        why = f"cannot be read ({error.strerror})" if unreadable else "cannot be used"  # type: ignore[union-attr]
        raise WrongSetting(f"{name} {file} {why}: {wanted}") from None


async def wait_until_usable(
    connection: Connection, topics: Mapping[str, Iterable[str]], health: Health, *, patience_s: float = math.inf
) -> dict[str, TopicLimits]:
    """Waits for the brokers and for every topic, by its role (``{"input_topics": [...], …}``), and creates none.

    Answers with the limits of each topic. What is missing is told once. Raises WrongSetting where the brokers refuse
    login or certificate, and BrokersAway where none could be used for ``patience_s``.
    """

    names = [name for group in topics.values() for name in group]

    async def look(client: AIOKafkaAdminClient) -> tuple[str, dict[str, TopicLimits]]:
        missing = await missing_topics(client, topics)
        names = [name for group in topics.values() for name in group]
        return missing, {} if missing else await topic_limits(client, names)

    return await _until_found(connection, health, look, names, patience_s=patience_s)


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
    *,
    patience_s: float = math.inf,
) -> Found:
    """Looks until nothing is missing: ``look`` answers with what is, as a sentence, and with what it has found."""
    backoff = Backoff()
    deadline = time.monotonic() + patience_s
    while True:
        client = admin_client(connection, names)
        try:
            async with asyncio.timeout(connection.request_timeout_s):
                await client.start()
                missing, found = await look(client)
                health.well("kafka")
                deadline = time.monotonic() + patience_s
                if not missing:
                    health.well("topics")
                    return found
            health.trouble("topics", f"{missing}; waiting for it")
        except UNREACHABLE as error:
            why = await why_unreachable(connection)
            health.trouble("kafka", unreachable(connection, error, why))
            if time.monotonic() > deadline:
                raise BrokersAway(
                    f"no broker could be used for {patience_s:g} s: {why or type(error).__name__}"
                ) from None
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
            except UNREACHABLE:
                if client is not None:
                    await _close(client)
                client = None
                if not health.is_well("kafka"):  # others tell that; this says why
                    health.explain("kafka", await _why_or_refused(connection))
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
        use_topics(client, names)
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


def unreachable(connection: Connection, error: BaseException, why: str = "") -> str:
    """That the brokers cannot be used at the moment, for the log; ``why`` as of ``why_unreachable``."""
    if why:
        return f"waiting for Kafka: {why}"
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


async def why_unreachable(connection: Connection) -> str:
    """Which addresses fail, who gave them, and what to do, as a sentence; empty where all of them answer.

    Every address is asked as a client asks it, for aiokafka's own start says no more than "unable to bootstrap". Takes
    some seconds. Raises WrongSetting where a broker refuses login or certificate, or wants one.
    """
    hosts = [(host, port) for host, port, _ in collect_hosts(connection.bootstrap_servers, randomize=False)]
    found = await asyncio.gather(*(_fault(connection, *each, "bootstrap_servers names it") for each in hosts))
    faults = list(filter(None, found))
    for (host, port), fault in zip(hosts, found, strict=True):
        if not fault:
            advertised = await _advertised(connection, host, port)
            others = [each for each in advertised if each[1:] not in hosts][:MOST_ADVERTISED]
            faults += filter(None, await asyncio.gather(*(_advertised_fault(connection, *each) for each in others)))
            break
    return "; ".join(faults)


async def _why_or_refused(connection: Connection) -> str:
    """As ``why_unreachable``, while running: what was right at the start may be so again."""
    try:
        return await why_unreachable(connection)
    except WrongSetting as refusal:
        return str(refusal)


async def _advertised_fault(connection: Connection, node: int, host: str, port: int) -> str:
    giver = (
        f"broker {node} gives it as its advertised listener; if it is wrong, set advertised.listeners of that broker"
    )
    return await _fault(connection, host, port, giver)


async def _fault(connection: Connection, host: str, port: int, giver: str) -> str:
    """What is wrong with one address; nothing where a broker answers."""
    broker = f"{host}:{port}"
    found = await listener_at(host, port, connection.ssl_context, min(connection.request_timeout_s, PROBE_S))
    if isinstance(found, ssl.SSLError):
        raise WrongSetting(tls_sentence(broker, found))
    if found is Listener.TLS:
        raise WrongSetting(
            f"the broker {broker} wants TLS, and security_protocol is {connection.security_protocol}; it should be "
            "SSL or SASL_SSL"
        )
    if found is Listener.KAFKA:
        return ""
    advice = _ADVICE.get(found, "check host and port").format(protocol=connection.security_protocol)
    return f"{broker} {found.value} ({giver}); {advice}"


async def _advertised(connection: Connection, host: str, port: int) -> list[tuple[int, str, int]]:
    """The brokers' own addresses, with their ids, as the one at this address tells them. Raises WrongSetting."""
    try:
        connected = await within(connection.request_timeout_s, _connected(connection, host, port))
        try:
            answer = await within(connection.request_timeout_s, connected.send(creating_no_topic([])))
        finally:
            connected.close()
    except (IllegalSaslStateError, UnsupportedSaslMechanismError) as error:
        await _refuse_other_login(connection, host, port)
        raise WrongSetting(_login_sentence(connection, f"{host}:{port}", error)) from None
    except _REFUSED_LOGIN as error:
        raise WrongSetting(_login_sentence(connection, f"{host}:{port}", error)) from None
    except ssl.SSLError as error:
        raise WrongSetting(tls_sentence(f"{host}:{port}", error)) from None
    except UNREACHABLE:
        if not connection.sasl_mechanism:
            await _refuse_other_login(connection, host, port)
        return []
    return [(node, name, number) for node, name, number, *_ in answer.brokers]


async def _connected(connection: Connection, host: str, port: int) -> AIOKafkaConnection:
    options = connection.options()
    del options["bootstrap_servers"]
    return await create_conn(host, port, **options)


async def _refuse_other_login(connection: Connection, host: str, port: int) -> None:
    """Raises WrongSetting where a listener takes no login and we have one, or the other way round, or takes another."""
    bare = connection.security_protocol.removeprefix("SASL_")
    anonymous = replace(connection, security_protocol=bare, sasl_mechanism=None)
    try:
        connected = await within(connection.request_timeout_s, _connected(anonymous, host, port))
        try:
            answer = await within(connection.request_timeout_s, connected.send(SaslHandShakeRequest("PLAIN")))
        finally:
            connected.close()
    except UNREACHABLE:
        return
    broker = f"{host}:{port}"
    if answer.error_code not in (0, UnsupportedSaslMechanismError.errno):
        if connection.sasl_mechanism:
            raise WrongSetting(
                f"the broker {broker} takes no login at this listener, and security_protocol is "
                f"{connection.security_protocol}; set it to {bare}, or name the port of a listener with SASL"
            )
        return
    offered = ", ".join(answer.enabled_mechanisms)
    if not connection.sasl_mechanism:
        raise WrongSetting(
            f"the broker {broker} wants a login, and security_protocol is {bare}; set it to SASL_{bare}, and "
            f"sasl_mechanism to one that it offers ({offered})"
        )
    if connection.sasl_mechanism not in answer.enabled_mechanisms:
        raise WrongSetting(
            f"the broker {broker} does not offer sasl_mechanism {connection.sasl_mechanism}; it offers {offered}"
        )


def _login_sentence(connection: Connection, broker: str, error: BaseException) -> str:
    return (
        f"the broker {broker} refuses the login of sasl_username {connection.sasl_username!r} by "
        f"{connection.sasl_mechanism} ({type(error).__name__}); check the user, the password and the mechanism"
    )


async def _close(client: AIOKafkaAdminClient) -> None:
    try:
        await within(5, client.close())
    except UNREACHABLE:
        await end_remains(client)
