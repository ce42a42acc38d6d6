"""Passwords, certificates and authorities that change in their files while a worker runs: new connections have the new."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin import AclOperation, AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

from tests.chaos.proxy import Proxy
from tests.conftest import broker_or_reason
from tests.support.broker import free_port
from tests.support.process import COSTLESS, WorkerProcess, Workers, workers_in
from tests.support.scenario import wait_until_committed
from tests.support.secure import CERTIFIED, HOST, PASSWORD, USER, Authority, SecureKafka, Security
from tests.support.topics import Kafka, Topics, numbered
from tests.support.waiting import holds_for, wait_for

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(300)]

NEW_PASSWORD = "a-new-staple-for-the-battery"
RENEWED = "renewed"  # the common name in the client's second certificate


@dataclass
class Secured:
    """A broker whose listeners workers reach through proxies, so that their connections can be broken."""

    kafka: SecureKafka
    proxies: dict[str, Proxy]

    def entrance(self, listener: str) -> str:
        return f"{HOST}:{self.proxies[listener].port}"

    def break_connections(self) -> None:
        for proxy in self.proxies.values():
            proxy.reset()


@pytest.fixture(scope="module")
def secured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    security = Security.made(tmp_path_factory.mktemp("certificates"))
    ports = {listener: free_port() for listener in ("LOGIN", "MUTUAL")}
    advertised = {listener: f"{HOST}:{port}" for listener, port in ports.items()}
    security = replace(security, extras=replace(security.extras, advertised=advertised))
    broker = broker_or_reason(request.config, controllable=True, extras=security.extras)
    kafka = SecureKafka(broker, security)
    proxies = {listener: Proxy(port, kafka.address(listener)) for listener, port in ports.items()}
    yield Secured(kafka, proxies)
    for proxy in proxies.values():
        proxy.close()
    broker.close()


@pytest.fixture
def kafka(secured: Secured, topics: Topics) -> Kafka:
    kafka = Kafka(secured.kafka.bootstrap)
    kafka.create_all(topics)
    return kafka


@pytest.fixture
def secured_workers(secured: Secured, tmp_path: Path) -> Iterator[Workers]:
    with workers_in(secured.kafka.bootstrap, Path("builtin"), tmp_path, COSTLESS, is_forked=True) as workers:
        yield workers


def allow(secured: Secured, user: str, topics: Topics) -> None:
    for topic in (topics.input, topics.output, topics.dead_letters):
        secured.kafka.allow(user, ResourceType.TOPIC, topic, AclOperation.READ, AclOperation.WRITE)
    secured.kafka.allow(user, ResourceType.GROUP, topics.group, AclOperation.READ)


class Feed:
    """Publishes some records, and waits until they are scored and committed."""

    def __init__(self, kafka: Kafka, topics: Topics) -> None:
        self._kafka = kafka
        self._topics = topics
        self.sent = 0

    def send(self) -> None:
        self._kafka.send(self._topics.input, map(numbered, range(self.sent, self.sent + 50)))
        self.sent += 50

    def is_scored(self) -> None:
        wait_until_committed(self._kafka, self._topics)
        assert self._kafka.count(self._topics.output) >= self.sent


def read_again(worker: WorkerProcess) -> int:
    return len(worker.lines("read again: "))


def goes_on(secured: Secured, worker: WorkerProcess, feed: Feed) -> None:
    """With new connections."""
    secured.break_connections()
    feed.send()
    feed.is_scored()
    worker.wait_until_ready()


def test_a_password_that_changes(
    secured: Secured, kafka: Kafka, topics: Topics, secured_workers: Workers, tmp_path: Path
) -> None:
    file = tmp_path / "password"
    file.write_text(PASSWORD)
    allow(secured, USER, topics)
    settings: dict[str, Any] = {
        "bootstrap_servers": secured.entrance("LOGIN"),
        "security_protocol": "SASL_SSL",
        "sasl_mechanism": "SCRAM-SHA-512",
        "sasl_username": USER,
        "ssl_cafile": secured.kafka.authority.cafile,
    }
    variables = {"WORKER_SASL_PASSWORD_FILE": str(file)}
    worker = secured_workers.start(topics, variables, **settings).wait_until_assigned(4)
    feed = Feed(kafka, topics)
    goes_on(secured, worker, feed)
    assert read_again(worker) == 0

    secured.kafka.set_password(NEW_PASSWORD)
    feed.send()
    feed.is_scored()  # by the connections that there are
    secured.break_connections()
    wait_for(lambda: worker.get("/readyz")[0] == 503, "the old password to be refused")
    assert worker.status("/livez") == 200
    file.write_text("")  # as one that is about to be written
    wait_for(lambda: worker.warnings("what was read before stays in use"), "the file to be read")
    holds_for(lambda: worker.is_running and worker.status("/livez") == 200, "it waits", 3)
    file.write_text(NEW_PASSWORD)
    feed.send()
    feed.is_scored()
    worker.wait_until_ready()
    assert read_again(worker) == 1
    (refusal,) = worker.warnings("what was read before stays in use")
    assert refusal.startswith(f"WORKER_SASL_PASSWORD_FILE: what {file} holds is wrong: it should not be empty")
    assert worker.terminate() == 0
    assert not [each for each in (PASSWORD, NEW_PASSWORD) if each in worker.output]
    secured.kafka.set_password(PASSWORD)


@pytest.fixture
def mutual(secured: Secured, tmp_path: Path) -> dict[str, Any]:
    """Settings with files of their own: authority, certificate and key."""
    certfile, keyfile = secured.kafka.authority.issue_files(CERTIFIED)
    files = {"ssl_cafile": secured.kafka.authority.cafile, "ssl_certfile": certfile, "ssl_keyfile": keyfile}
    own = {name: tmp_path / name for name in files}
    for name, file in files.items():
        own[name].write_bytes(file.read_bytes())
    patient = {"session_timeout_ms": 60_000}  # a member that has lost its connections stays one: nothing comes twice
    return {"bootstrap_servers": secured.entrance("MUTUAL"), "security_protocol": "SSL", **own, **patient}


def test_a_certificate_that_changes(
    secured: Secured, kafka: Kafka, topics: Topics, secured_workers: Workers, mutual: dict[str, Any]
) -> None:
    allow(secured, CERTIFIED, topics)
    worker = secured_workers.start(topics, **mutual).wait_until_assigned(4)
    feed = Feed(kafka, topics)
    goes_on(secured, worker, feed)

    certificate, key = secured.kafka.authority.issue(RENEWED)
    mutual["ssl_certfile"].write_text(certificate)
    goes_on(secured, worker, feed)  # as the one that the broker knows
    mutual["ssl_keyfile"].write_text(key[:100])
    goes_on(secured, worker, feed)
    (refusal,) = worker.warnings("what was read before stays in use")
    assert f"ssl_keyfile {mutual['ssl_keyfile']} cannot be used" in refusal

    secured.kafka.forbid_all(CERTIFIED)
    allow(secured, RENEWED, topics)
    mutual["ssl_keyfile"].write_text(key)
    goes_on(secured, worker, feed)  # as the one that has the permissions now
    assert read_again(worker) == 1
    assert len(worker.warnings("what was read before stays in use")) == 1
    assert worker.terminate() == 0
    assert kafka.count(topics.output) == feed.sent


def test_an_authority_that_changes(
    secured: Secured, kafka: Kafka, topics: Topics, secured_workers: Workers, mutual: dict[str, Any], tmp_path: Path
) -> None:
    """The broker has a certificate of another authority, which alone is in the file now."""
    allow(secured, CERTIFIED, topics)
    worker = secured_workers.start(topics, **mutual).wait_until_assigned(4)
    feed = Feed(kafka, topics)
    goes_on(secured, worker, feed)

    other = Authority(tmp_path, "other")
    certificate, key = other.issue("broker", [HOST])
    chain = ConfigResource(
        ConfigResource.Type.BROKER,
        "1",
        incremental_configs=[
            ConfigEntry(f"listener.name.mutual.ssl.{name}", value, incremental_operation=AlterConfigOpType.SET)
            for name, value in {"keystore.certificate.chain": certificate, "keystore.key": key}.items()
        ],
    )
    kafka.admin.incremental_alter_configs([chain])[chain].result(30)
    mutual["ssl_cafile"].write_bytes(other.cafile.read_bytes())
    goes_on(secured, worker, feed)
    assert read_again(worker) == 1
    assert worker.terminate() == 0
    assert kafka.count(topics.output) == feed.sent
