"""A broker that demands credentials, certificates and permissions: what works, and what is said of what does not."""

import asyncio
import base64
import http.client
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin import AclOperation, ResourceType

from tests.conftest import broker_or_reason
from tests.integration.test_exactly_once import freeze_in_a_transaction
from tests.integration.test_replay import dead_letter
from tests.support.process import COSTLESS, FORK_SERVER, WorkerProcess, Workers, environment, forked, workers_in
from tests.support.scenario import wait_until_committed
from tests.support.secure import CERTIFIED, PASSWORD, SCRAM, USER, Authority, SecureKafka, Security
from tests.support.topics import Kafka, Record, Topics, numbered
from tests.support.waiting import holds_for, wait_for
from worker.errors import WrongSetting
from worker.kafka.connection import Connection, tls_context
from worker.kafka.permissions import Permissions
from worker.kafka.topics import wait_until_usable
from worker.telemetry.health import Health

pytestmark = pytest.mark.kafka

MECHANISMS = ("PLAIN", *SCRAM)
READ, WRITE, DESCRIBE = AclOperation.READ, AclOperation.WRITE, AclOperation.DESCRIBE
TOPIC, GROUP = ResourceType.TOPIC, ResourceType.GROUP


@pytest.fixture(scope="module")
def secure(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureKafka]:
    security = Security.made(tmp_path_factory.mktemp("certificates"))
    broker = broker_or_reason(request.config, controllable=True, extras=security.extras)
    yield SecureKafka(broker, security)
    broker.close()


@pytest.fixture
def kafka(secure: SecureKafka) -> Kafka:
    """The tests' own client, which may do everything."""
    return Kafka(secure.bootstrap)


@pytest.fixture
def secure_workers(secure: SecureKafka, checkpoint: Path, tmp_path: Path) -> Iterator[Workers]:
    with workers_in(secure.bootstrap, checkpoint, tmp_path, COSTLESS, is_forked=True) as workers:
        yield workers


class Entrance:
    """How one client comes in: the settings of a worker, and a connection made as the worker makes it."""

    def __init__(
        self, secure: SecureKafka, listener: str, protocol: str, password: str | None = None, **how: Any
    ) -> None:
        self.password = password
        self.settings = {"bootstrap_servers": secure.address(listener), "security_protocol": protocol, **how}

    def connection(self) -> Connection:
        files = [self.settings.get(name) for name in ("ssl_cafile", "ssl_certfile", "ssl_keyfile")]
        context = (
            tls_context(*[str(file) if file else None for file in files], None) if "SSL" in self._protocol else None
        )
        return Connection(
            (self.settings["bootstrap_servers"],),
            request_timeout_ms=10_000,
            security_protocol=self._protocol,
            sasl_mechanism=self.settings.get("sasl_mechanism"),
            sasl_username=self.settings.get("sasl_username"),
            sasl_password=self.password,
            ssl_context=context,
        )

    def variables(self, folder: Path) -> dict[str, str]:
        """The environment of its worker: the password's file."""
        if self.password is None:
            return {}
        (folder / "password").write_text(self.password + "\n")
        (folder / "password").chmod(0o600)
        return {"WORKER_SASL_PASSWORD_FILE": str(folder / "password")}

    @property
    def _protocol(self) -> str:
        protocol: str = self.settings["security_protocol"]
        return protocol


def by_login(secure: SecureKafka, mechanism: str, listener: str = "LOGIN", **other: Any) -> Entrance:
    trust = {"ssl_cafile": secure.authority.cafile} if listener == "LOGIN" else {}
    protocol = "SASL_SSL" if listener == "LOGIN" else "SASL_PLAINTEXT"
    how = {"sasl_mechanism": mechanism, "sasl_username": USER, "password": PASSWORD, **trust, **other}
    return Entrance(secure, listener, protocol, **how)


def by_certificate(secure: SecureKafka, authority: Authority | None = None) -> Entrance:
    certfile, keyfile = (authority or secure.authority).issue_files(CERTIFIED)
    return Entrance(
        secure, "MUTUAL", "SSL", ssl_cafile=secure.authority.cafile, ssl_certfile=certfile, ssl_keyfile=keyfile
    )


def by_tls(secure: SecureKafka, listener: str = "TLS", **other: Any) -> Entrance:
    return Entrance(secure, listener, **{"protocol": "SSL", "ssl_cafile": secure.authority.cafile, **other})


async def enter(entrance: Entrance, topic: str) -> None:
    await asyncio.wait_for(wait_until_usable(entrance.connection(), {"input_topics": [topic]}, Health()), 60)


# --- What works ---


@pytest.fixture
def topic(kafka: Kafka, topics: Topics, secure: SecureKafka) -> str:
    """A topic that every user of these tests may ask about."""
    kafka.create(topics.input)
    for user in (USER, CERTIFIED):
        secure.allow(user, TOPIC, topics.input, DESCRIBE)
    return topics.input


@pytest.mark.parametrize("listener", ["LOGIN", "OPENLOGIN"])
@pytest.mark.parametrize("mechanism", MECHANISMS)
async def test_the_right_password_is_let_in(secure: SecureKafka, topic: str, mechanism: str, listener: str) -> None:
    await enter(by_login(secure, mechanism, listener), topic)


async def test_the_right_certificate_is_let_in(secure: SecureKafka, topic: str) -> None:
    await enter(by_certificate(secure), topic)
    await enter(by_tls(secure), topic)


# --- What is refused ---


def strangers(secure: SecureKafka, folder: Path) -> dict[str, tuple[Entrance, list[str]]]:
    """Who is not let in, and what is said of it."""
    other = Authority(folder, "other")
    login = ["refuses the login", USER, "check the user, the password and the mechanism"]
    expired_certfile, expired_keyfile = secure.authority.issue_files("late", days=-1)
    return {
        **{
            f"wrong password {name}": (by_login(secure, name, password="guessed"), [*login, name])
            for name in MECHANISMS
        },
        **{
            f"unknown user {name}": (
                by_login(secure, name, sasl_username="nobody"),
                ["refuses the login", "nobody", name],
            )
            for name in MECHANISMS
        },
        "wrong password, open": (by_login(secure, "PLAIN", "OPENLOGIN", password="guessed"), login),
        "unknown authority": (by_tls(secure, ssl_cafile=other.cafile), ["certificate", "ssl_cafile"]),
        "the system's authorities": (by_tls(secure, ssl_cafile=None), ["certificate", "ssl_cafile"]),
        "unknown authority, login": (
            by_login(secure, "PLAIN", ssl_cafile=other.cafile),
            ["certificate", "ssl_cafile"],
        ),
        "wrong host name": (by_tls(secure, "MISNAMED"), ["IP address mismatch", "the broker's name"]),
        "expired": (by_tls(secure, "EXPIRED"), ["certificate has expired"]),
        "no certificate": (by_tls(secure, "MUTUAL"), ["ssl_certfile"]),
        "another authority's certificate": (by_certificate(secure, other), ["ssl_certfile"]),
        "an expired certificate": (
            by_tls(secure, "MUTUAL", ssl_certfile=expired_certfile, ssl_keyfile=expired_keyfile),
            ["ssl_certfile"],
        ),
        "no TLS where it is wanted": (Entrance(secure, "TLS", "PLAINTEXT"), ["wants TLS", "SSL or SASL_SSL"]),
        "no TLS for a login": (
            Entrance(secure, "LOGIN", "SASL_PLAINTEXT", PASSWORD, sasl_mechanism="SCRAM-SHA-256", sasl_username=USER),
            ["wants TLS", "SSL or SASL_SSL"],
        ),
        "a login where none is taken": (
            Entrance(secure, "", "SASL_PLAINTEXT", PASSWORD, sasl_mechanism="PLAIN", sasl_username=USER),
            ["takes no login at this listener", "security_protocol is SASL_PLAINTEXT; set it to PLAINTEXT"],
        ),
        "a login by TLS where none is taken": (
            by_tls(secure, "TLS", sasl_mechanism="PLAIN", sasl_username=USER, password=PASSWORD, protocol="SASL_SSL"),
            ["takes no login at this listener", "security_protocol is SASL_SSL; set it to SSL"],
        ),
        "no login where one is wanted": (
            Entrance(secure, "OPENLOGIN", "PLAINTEXT"),
            ["wants a login, and security_protocol is PLAINTEXT", "set it to SASL_PLAINTEXT", "SCRAM-SHA-256"],
        ),
        "no login by TLS where one is wanted": (
            by_tls(secure, "LOGIN"),
            ["wants a login, and security_protocol is SSL", "set it to SASL_SSL", "SCRAM-SHA-256"],
        ),
        "another mechanism": (
            by_login(secure, "SCRAM-SHA-256", "ONLYPLAIN"),
            ["does not offer sasl_mechanism SCRAM-SHA-256; it offers PLAIN"],
        ),
    }


STRANGERS = (
    *(f"{what} {name}" for what in ("wrong password", "unknown user") for name in MECHANISMS),
    "wrong password, open",
    "unknown authority",
    "the system's authorities",
    "unknown authority, login",
    "wrong host name",
    "expired",
    "no certificate",
    "another authority's certificate",
    "an expired certificate",
    "no TLS where it is wanted",
    "no TLS for a login",
    "a login where none is taken",
    "a login by TLS where none is taken",
    "no login where one is wanted",
    "no login by TLS where one is wanted",
    "another mechanism",
)


@pytest.mark.parametrize("who", STRANGERS)
async def test_who_is_refused_is_told_so_in_a_sentence(secure: SecureKafka, tmp_path: Path, who: str) -> None:
    entrance, words = strangers(secure, tmp_path)[who]
    with pytest.raises(WrongSetting) as refusal:
        await enter(entrance, "any")
    sentence = str(refusal.value)
    assert all(word in sentence for word in words)
    assert "\n" not in sentence
    assert PASSWORD not in sentence
    assert "guessed" not in sentence


async def test_a_listener_without_tls_is_waited_for_with_a_hint(
    secure: SecureKafka, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be a broker that is starting, behind something that accepts for it: not certain enough to end."""
    waiting = asyncio.create_task(enter(by_tls(secure, "OPENLOGIN"), "any"))
    async with asyncio.timeout(60):
        while "does not speak TLS" not in caplog.text:
            assert not waiting.done()
            await asyncio.sleep(0.1)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


def test_a_key_with_a_password(secure: SecureKafka) -> None:
    """Which OpenSSL would ask for on the terminal."""
    certfile, keyfile = map(str, secure.authority.issue_files("locked", password=PASSWORD))
    tls_context(None, certfile, keyfile, PASSWORD)
    for wrong in (None, "", "guessed"):
        with pytest.raises(WrongSetting, match="ssl_key") as refusal:
            tls_context(None, certfile, keyfile, wrong)
        assert PASSWORD not in str(refusal.value)
        assert "guessed" not in str(refusal.value)


# --- The whole worker ---

NEEDED = {  # what docs/operating.md says a worker needs
    "input": (TOPIC, (READ,)),
    "output": (TOPIC, (WRITE,)),
    "dead_letters": (TOPIC, (WRITE,)),
    "group": (GROUP, (READ,)),
}


def allow(secure: SecureKafka, user: str, topics: Topics, *roles: str) -> None:
    for role in roles:
        kind, operations = NEEDED[role]
        secure.allow(user, kind, getattr(topics, role), *operations)


ENTRANCES: dict[str, Callable[[SecureKafka], Entrance]] = {
    "PLAIN by TLS": lambda secure: by_login(secure, "PLAIN"),
    "SCRAM-SHA-256, open": lambda secure: by_login(secure, "SCRAM-SHA-256", "OPENLOGIN"),
    "SCRAM-SHA-512 by TLS": lambda secure: by_login(secure, "SCRAM-SHA-512"),
    "certificate": by_certificate,
}


@pytest.mark.parametrize("way", ENTRANCES)
def test_a_worker_with_just_what_it_needs(
    secure: SecureKafka, kafka: Kafka, topics: Topics, secure_workers: Workers, tmp_path: Path, way: str
) -> None:
    entrance = ENTRANCES[way](secure)
    kafka.create_all(topics)
    allow(secure, CERTIFIED if way == "certificate" else USER, topics, *NEEDED)
    kafka.send(topics.input, [*map(numbered, range(99)), Record(b"{", b"key")])
    worker = secure_workers.start(topics, entrance.variables(tmp_path), **entrance.settings)
    worker.wait_until_ready()
    wait_until_committed(kafka, topics)
    assert worker.terminate() == 0
    assert (kafka.count(topics.output), kafka.count(topics.dead_letters)) == (99, 1)
    assert unforeseen(worker) == []


def unforeseen(worker: WorkerProcess) -> list[str]:
    """What is warned of, but for a login without TLS, which some of these tests have on purpose."""
    return [words for words in worker.warnings() if "nothing is encrypted" not in words]


@pytest.mark.parametrize(
    "who", ["wrong password SCRAM-SHA-512", "unknown authority", "wrong host name", "expired", "no certificate"]
)
def test_a_worker_that_is_refused_ends_with_a_sentence(
    secure: SecureKafka, topics: Topics, secure_workers: Workers, tmp_path: Path, who: str
) -> None:
    entrance, words = strangers(secure, tmp_path)[who]
    worker = secure_workers.start(topics, entrance.variables(tmp_path), **entrance.settings)
    assert worker.wait(90) == 2
    (sentence,) = unforeseen(worker)
    assert all(word in sentence for word in words)
    assert "Traceback" not in worker.output


MISSING = {  # a role without its permission, and what is said of it
    "input": "input_topics: topic {} cannot be seen without DESCRIBE",
    "output": "output_topic: topic {} cannot be seen without DESCRIBE",
    "dead_letters": "dead_letter_topic: topic {} cannot be seen without DESCRIBE",
    "group": "cannot read: missing READ on group {}; add the ACL",
}


@pytest.mark.parametrize("role", MISSING)
def test_a_missing_permission_is_told_once_and_waited_for(
    secure: SecureKafka, kafka: Kafka, topics: Topics, secure_workers: Workers, tmp_path: Path, role: str
) -> None:
    entrance = by_login(secure, "SCRAM-SHA-256")
    kafka.create_all(topics)
    kafka.send(topics.input, [*map(numbered, range(9)), Record(b"{", b"key")])
    allow(secure, USER, topics, *(set(NEEDED) - {role}))
    worker = secure_workers.start(topics, entrance.variables(tmp_path), **entrance.settings)
    words = MISSING[role].format(getattr(topics, role))
    wait_for(lambda: worker.warnings(words), f"a line: {words}", 120)
    holds_for(lambda: (worker.status("/livez"), worker.status("/readyz")) == (200, 503), "it lives and is not ready", 5)
    assert len(worker.warnings(words)) == 1
    assert "Traceback" not in worker.output
    assert len(worker.warnings()) < 5
    allow(secure, USER, topics, role)
    worker.wait_until_ready()
    wait_until_committed(kafka, topics)
    assert worker.terminate() == 0
    assert (kafka.count(topics.output), kafka.count(topics.dead_letters)) == (9, 1)


WITHDRAWN = {
    "input": "cannot read: missing READ on topic {}; add the ACL",
    "output": "cannot publish to topic {0}: missing WRITE on topic {0}; add the ACL",
    "dead_letters": "cannot publish to topic {0}: missing WRITE on topic {0}; add the ACL",
    "group": "cannot read: missing READ on group {}; add the ACL",
}


@pytest.mark.parametrize("role", WITHDRAWN)
def test_a_permission_to_ask_about_a_topic_is_not_enough(
    secure: SecureKafka, kafka: Kafka, topics: Topics, secure_workers: Workers, tmp_path: Path, role: str
) -> None:
    """A worker finds out while it runs: it may see every topic, and its permission is taken away."""
    entrance = by_login(secure, "SCRAM-SHA-256")
    kafka.create_all(topics, 1)
    allow(secure, USER, topics, *NEEDED)
    worker = secure_workers.start(topics, entrance.variables(tmp_path), **entrance.settings).wait_until_assigned(1)
    secure.forbid_all(USER)
    for name in (topics.input, topics.output, topics.dead_letters):
        secure.allow(USER, TOPIC, name, DESCRIBE)
    allow(secure, USER, topics, *(set(NEEDED) - {role}))
    kafka.send(topics.input, [*map(numbered, range(9)), Record(b"{", b"key")])
    words = WITHDRAWN[role].format(getattr(topics, role))
    wait_for(lambda: worker.warnings(words), f"a line: {words}", 120)
    holds_for(lambda: (worker.status("/livez"), worker.status("/readyz")) == (200, 503), "it lives and is not ready", 5)
    assert len(worker.warnings(words)) == 1
    assert "Traceback" not in worker.output
    assert len(worker.warnings()) < 8
    allow(secure, USER, topics, role)
    wait_until_committed(kafka, topics)
    worker.wait_until_ready()
    assert worker.terminate() == 0
    assert (kafka.count(topics.output), kafka.count(topics.dead_letters)) == (9, 1)


def test_exactly_once_needs_its_transactional_ids(
    secure: SecureKafka, kafka: Kafka, topics: Topics, secure_workers: Workers, tmp_path: Path
) -> None:
    entrance = by_login(secure, "SCRAM-SHA-256")
    kafka.create_all(topics, 1)
    kafka.send(topics.input, [*map(numbered, range(9)), Record(b"{", b"key")])
    allow(secure, USER, topics, *NEEDED)
    settings = {**entrance.settings, "delivery": "exactly-once", "group_instance_id": "member"}
    worker = secure_workers.start(topics, entrance.variables(tmp_path), **settings)
    words = f"missing WRITE and DESCRIBE on transactional ids with the prefix {topics.group}/; add the ACL"
    wait_for(lambda: worker.warnings(words), f"a line: {words}", 120)
    holds_for(lambda: (worker.status("/livez"), worker.status("/readyz")) == (200, 503), "it lives and is not ready", 5)
    assert len(worker.warnings(words)) == 1
    assert "Traceback" not in worker.output
    assert not kafka.read(topics.output)
    name = f"{topics.group}/member"
    secure.allow(USER, ResourceType.TRANSACTIONAL_ID, name, WRITE, DESCRIBE)
    worker.wait_until_ready()
    wait_until_committed(kafka, topics)
    assert worker.terminate() == 0
    assert (len(kafka.read(topics.output)), len(kafka.read(topics.dead_letters))) == (9, 1)


def test_exactly_once_tells_which_topic_it_may_commit_no_offsets_of(
    secure: SecureKafka, kafka: Kafka, topics: Topics, secure_workers: Workers, tmp_path: Path
) -> None:
    """The permission goes while a transaction is open. What is in it is sent again once the permission is back."""
    entrance = by_login(secure, "SCRAM-SHA-256")
    kafka.create_all(topics, 1)
    allow(secure, USER, topics, *NEEDED)
    prefix = f"{topics.group}/member"
    secure.allow(USER, ResourceType.TRANSACTIONAL_ID, prefix, WRITE, DESCRIBE)
    settings = {**entrance.settings, "delivery": "exactly-once", "group_instance_id": "member", "transaction_ms": 3_333}
    worker = secure_workers.start(topics, entrance.variables(tmp_path), **settings).wait_until_assigned(1)
    kafka.send(topics.input, map(numbered, range(9)))
    wait_until_committed(kafka, topics)
    kafka.send(topics.input, map(numbered, range(9, 18)))
    wait_for(lambda: freeze_in_a_transaction(worker, kafka, topics), "a transaction to be frozen in", every=0.02)
    secure.forbid_all(USER)
    allow(secure, USER, topics, *(set(NEEDED) - {"input"}))
    secure.allow(USER, TOPIC, topics.input, DESCRIBE)
    secure.allow(USER, ResourceType.TRANSACTIONAL_ID, prefix, WRITE, DESCRIBE)
    worker.resume()
    words = f"cannot commit a transaction: missing READ on topic {topics.input}; add the ACL"
    wait_for(lambda: worker.warnings(words), f"a line: {words}", 60)
    assert len(worker.warnings(words)) == 1
    assert "Traceback" not in worker.output
    assert "KafkaError" not in worker.output
    allow(secure, USER, topics, "input")
    wait_until_committed(kafka, topics)
    worker.wait_until_ready()
    assert worker.terminate() == 0
    assert len(kafka.read(topics.output)) == 18


@pytest.mark.parametrize("role", ["group", "input", "output"])
def test_check_tells_which_permission_is_missing(
    secure: SecureKafka, kafka: Kafka, topics: Topics, tmp_path: Path, role: str
) -> None:
    entrance = by_login(secure, "SCRAM-SHA-256")
    kafka.create_all(topics, 1)
    allow(secure, USER, topics, *(set(NEEDED) - {role}))
    for name in (topics.input, topics.output):
        secure.allow(USER, TOPIC, name, DESCRIBE)
    done = forked("check", *check_words(entrance, topics), **entrance.variables(tmp_path))
    lacking = f"{'WRITE' if role == 'output' else 'READ'} on {'group' if role == 'group' else 'topic'}"
    assert f"fail  permissions  missing {lacking} {getattr(topics, role)}; add the ACL\n" in done.stdout
    assert done.returncode == 1
    assert done.stderr == ""


def test_check_says_of_a_topic_that_it_may_not_see_that_it_may_exist(
    secure: SecureKafka, kafka: Kafka, topics: Topics, tmp_path: Path
) -> None:
    entrance = by_login(secure, "SCRAM-SHA-256")
    kafka.create_all(topics, 1)
    allow(secure, USER, topics, "output", "group", "dead_letters")
    done = forked("check", *check_words(entrance, topics), **entrance.variables(tmp_path))
    words = "cannot be seen without DESCRIBE, whether it exists or not; add the ACL (READ or WRITE brings it)"
    assert f"input_topics: topic {topics.input} {words}\n" in done.stdout
    assert "create it" not in done.stdout
    assert done.returncode == 1


def check_words(entrance: Entrance, topics: Topics) -> list[str]:
    names = {"input_topics": topics.input, "output_topic": topics.output, "dead_letter_topic": topics.dead_letters}
    settings = {**entrance.settings, **names, "group_id": topics.group, "model": "builtin", "http_port": 0}
    return words_of(settings)


def words_of(settings: dict[str, Any]) -> list[str]:
    return [str(word) for name, value in settings.items() for word in ("--" + name.replace("_", "-"), value)]


def replay_words(entrance: Entrance, topics: Topics) -> list[str]:
    settings = {**entrance.settings, "dead_letter_topic": topics.dead_letters, "group_id": topics.group}
    return ["replay", *words_of(settings)]


@pytest.mark.parametrize("writes_elsewhere", [True, False])
def test_a_replay_that_may_not_write_ends_at_a_signal_and_goes_on_once_it_may(
    secure: SecureKafka, kafka: Kafka, topics: Topics, tmp_path: Path, writes_elsewhere: bool
) -> None:
    entrance = by_login(secure, "SCRAM-SHA-256")
    kafka.create_all(topics, 1)
    secure.forbid_all(USER)
    if writes_elsewhere:  # without that brokers refuse the producer, and not what it sends
        secure.allow(USER, TOPIC, topics.output, WRITE)
    secure.allow(USER, TOPIC, topics.dead_letters, READ)
    secure.allow(USER, GROUP, f"{topics.group}.replay", READ)
    secure.allow(USER, TOPIC, topics.input, DESCRIBE)
    kafka.send(topics.dead_letters, [dead_letter(number, topics) for number in range(9)])
    words, variables, errors = replay_words(entrance, topics), entrance.variables(tmp_path), tmp_path / "errors"
    with errors.open("wb") as stderr, (tmp_path / "output").open("wb") as stdout:
        going = FORK_SERVER.start(
            "worker",
            [*words, "--request-timeout-ms", "300000"],
            env=environment() | variables,
            cwd=tmp_path,
            stdout=stdout,
            stderr=stderr,
        )
    try:
        where = f" to topic {topics.input}" if writes_elsewhere else ""
        lacking = f"cannot publish{where}: missing WRITE on topic {topics.input}; add the ACL"
        wait_for(
            lambda: lacking in errors.read_text(), "the missing permission to be told", 60, describe=errors.read_text
        )
        going.send_signal(signal.SIGTERM)
        assert going.wait(120) == 1
    finally:
        going.kill()
    told = errors.read_text()
    assert f"{'publish' if writes_elsewhere else 'producer'}: {lacking}; the next replay goes on there" in told
    assert "Traceback" not in told
    assert kafka.committed(f"{topics.group}.replay", topics.dead_letters) == {}
    secure.allow(USER, TOPIC, topics.input, WRITE)
    again = forked(*words, **variables)
    assert again.returncode == 0, again.stderr
    assert kafka.count(topics.input) == 9


@pytest.mark.parametrize("arguments", [(), ("--dry-run",)])
@pytest.mark.parametrize("role", ["group", "dead_letters"])
def test_a_replay_that_may_not_read_names_the_permission(
    secure: SecureKafka, kafka: Kafka, topics: Topics, tmp_path: Path, role: str, arguments: tuple[str, ...]
) -> None:
    entrance, group = by_login(secure, "SCRAM-SHA-256"), f"{topics.group}.replay"
    kafka.create_all(topics, 1)
    kafka.send(topics.dead_letters, [dead_letter(1, topics)])
    secure.allow(USER, TOPIC, topics.dead_letters, DESCRIBE if role == "dead_letters" else READ)
    if role == "dead_letters":
        secure.allow(USER, GROUP, group, READ)
    done = forked(*replay_words(entrance, topics), *arguments, **entrance.variables(tmp_path))
    lacking = f"group {group}" if role == "group" else f"topic {topics.dead_letters}"
    assert f"missing READ on {lacking}; add the ACL" in done.stderr
    assert "waiting for Kafka" not in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 1


# --- Secrets ---

TOKEN = "token-0123456789abcdef"
KEY_PASSWORD = "password-of-the-key"
CLIENT_SECRET = "secret-of-the-oauth-client"
GUESS = "guessed-by-a-client"


def forms(secret: str) -> list[str]:
    """A secret as it may be printed."""
    plain = secret.encode()
    login = f"\0{USER}\0{secret}".encode()
    return [secret, plain.hex(), *(base64.b64encode(each).decode().rstrip("=")[:-1] for each in (plain, login))]


def everything_served(worker: WorkerProcess) -> str:
    """Each address with the token, without and with another one; what is no request; what does not exist."""
    served = ""
    port = int(worker.url.rpartition(":")[2])
    for path in ("/", "/metrics", "/livez", "/readyz", "/reload", "/nowhere", f"/?token={GUESS}"):
        for method in ("GET", "HEAD", "POST"):
            for token in (None, TOKEN, GUESS):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
                connection.request(method, path, headers={"Authorization": f"Bearer {token}"} if token else {})
                answer = connection.getresponse()
                served += f"{answer.status} {answer.reason} {answer.getheaders()} {answer.read(200_000)!r}"
                connection.close()
    with socket.create_connection(("127.0.0.1", port), timeout=30) as raw:
        raw.sendall(f"GET /metrics HTTP/1.1\r\nAuthorization: Bearer {TOKEN}\x00\r\n\r\n".encode())
        served += repr(raw.recv(65_536))
    return served


@pytest.mark.parametrize("source", ["variables", "files"])
@pytest.mark.parametrize("kind", ["well", "refused"])
def test_no_secret_is_ever_printed_or_served(
    secure: SecureKafka, kafka: Kafka, topics: Topics, secure_workers: Workers, tmp_path: Path, source: str, kind: str
) -> None:
    certfile, keyfile = secure.authority.issue_files("with-a-password", password=KEY_PASSWORD)
    entrance = by_login(
        secure, "SCRAM-SHA-256" if kind == "well" else "PLAIN", ssl_certfile=certfile, ssl_keyfile=keyfile
    )
    password = PASSWORD if kind == "well" else "a-wrong-but-secret-one"
    secrets = {
        "SASL_PASSWORD": password,
        "HTTP_TOKEN": TOKEN,
        "SSL_KEY_PASSWORD": KEY_PASSWORD,
        "OAUTH_CLIENT_SECRET": CLIENT_SECRET,  # which this login does not use; tests/reach/test_oauth.py has one that does
    }
    variables = {}
    for name, secret in secrets.items():
        (tmp_path / name).write_text(secret)
        (tmp_path / name).chmod(0o600)
        by_file = source == "files"
        variables[f"WORKER_{name}{'_FILE' if by_file else ''}"] = str(tmp_path / name) if by_file else secret
    if kind == "well":
        kafka.create_all(topics)
        allow(secure, USER, topics, "input", "output", "group")  # and not the dead letters: that is told
    settings = {**entrance.settings, "log_level": "debug", "http_token_for": "all"}
    worker = secure_workers.start(topics, variables, module="worker", **settings)
    served = ""  # who is refused ends while the model is loading
    if kind == "well":
        worker.wait_for_status("/livez", 200)
        served += everything_served(worker)
        wait_for(lambda: worker.warnings("ACL"), "a missing permission", 120)
        allow(secure, USER, topics, "dead_letters")
        kafka.send(topics.input, map(numbered, range(9)))
        wait_until_committed(kafka, topics)
        served += everything_served(worker)
        assert "sentiment_worker_records_consumed_total" in served
        assert worker.terminate() == 0
    else:
        assert worker.wait(120) == 2
    assert '"level":"DEBUG"' in worker.output
    for secret in secrets.values():
        assert not [form for form in forms(secret) if form in worker.output + served]
    assert not [form for form in forms(GUESS) if form in worker.output]


def test_a_command_with_secrets_prints_none(tmp_path: Path) -> None:
    secrets = {
        "SASL_PASSWORD": PASSWORD,
        "HTTP_TOKEN": "too-short-token",
        "SSL_KEY_PASSWORD": KEY_PASSWORD,
        "OAUTH_CLIENT_SECRET": CLIENT_SECRET,
    }
    variables = {f"WORKER_{name}": secret for name, secret in secrets.items()}
    for arguments in (["--help"], ["--sasl-password", PASSWORD], [], ["--nosuch", PASSWORD], ["--log-level", "loud"]):
        command = [sys.executable, "-m", "worker", "run", *arguments]
        done = subprocess.run(
            command,
            env={**environment(), **variables},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )
        assert done.returncode == (0 if arguments == ["--help"] else 2)
        for secret in secrets.values():
            assert secret not in done.stdout + done.stderr


# --- What may be done is asked without doing it ---


async def test_permissions_are_found_out_one_by_one(secure: SecureKafka, kafka: Kafka, topics: Topics) -> None:
    kafka.create(topics.input)
    secure.forbid_all(USER)
    secure.allow(USER, TOPIC, topics.input, DESCRIBE)
    secure.allow(USER, GROUP, topics.group, DESCRIBE)
    name = f"{topics.group}/{topics.input}/0"
    asked = {
        "read": lambda it: it.may_read(topics.input),
        "write": lambda it: it.may_write(topics.input),
        "join": lambda it: it.may_join(topics.group),
        "transact": lambda it: it.may_transact(name, topics.input),
    }

    async def answers() -> dict[str, bool]:
        permissions = Permissions(by_login(secure, "PLAIN").connection())
        await permissions.start([topics.input])
        try:
            return {what: await ask(permissions) for what, ask in asked.items()}
        finally:
            await permissions.close()

    assert await answers() == dict.fromkeys(asked, False)
    secure.allow(USER, TOPIC, topics.input, READ, WRITE)
    secure.allow(USER, GROUP, topics.group, READ)
    secure.allow(USER, ResourceType.TRANSACTIONAL_ID, name, WRITE, DESCRIBE)
    assert await answers() == dict.fromkeys(asked, True)
    assert kafka.read(topics.input) == []
