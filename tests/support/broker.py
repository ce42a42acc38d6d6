"""A real Kafka for the tests: one KRaft node that can be stopped, killed and paused, and keeps its data.

Where it comes from, in this order (`TEST_KAFKA=external|docker|java` takes only that one):
the brokers named in `TEST_KAFKA_BOOTSTRAP`; the official image where Docker runs; Apache Kafka's jars from Maven
Central on this machine's Java.
"""

import fcntl
import io
import os
import random
import shutil
import signal
import socket
import subprocess
import sysconfig
import tarfile
import tempfile
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from tests.support import maven
from tests.support.component import UnavailableError
from tests.support.waiting import wait_for, wait_until_frozen

POM = Path(__file__).parents[1] / "kafka" / "pom.xml"
VERSION = os.environ.get("TEST_KAFKA_VERSION") or POM.read_text().partition("<kafka.version>")[2].partition("<")[0]
HEAP = "-Xms128m -Xmx512m -XX:TieredStopAtLevel=1"
START_SECONDS = 180


class NotOursError(UnavailableError):
    """The test stops its broker, and the one given is not ours to stop."""


@dataclass(frozen=True)
class Extras:
    """What a broker has beside its plain listener: listeners by name, each a protocol and a port, and properties.

    `advertised` says, by listener, where clients are sent to if not to its own port: a proxy's. Nodes of one cluster have
    one `cluster_id`.
    """

    listeners: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    properties: Mapping[str, str] = field(default_factory=dict)
    advertised: Mapping[str, str] = field(default_factory=dict)
    cluster_id: str = field(default_factory=lambda: str(uuid.uuid4()))


class Broker(ABC):
    """One Kafka node at `bootstrap`. `start` after `stop` or `kill` gives the same address and the same data."""

    kind: str
    bootstrap: str
    controllable = True

    def start(self) -> None:
        """Blocks until clients are answered."""
        self._launch()
        self.wait_until_up()

    def wait_until_up(self) -> None:
        """Asks once it listens, and waits for that answer: librdkafka 2.16 crashes by one that comes after its timeout."""
        wait_for(lambda: self._check_alive() or listens(self.bootstrap), f"Kafka at {self.bootstrap}", START_SECONDS)
        client = AdminClient({"bootstrap.servers": self.bootstrap, "log_level": 0, "reconnect.backoff.max.ms": 500})
        try:
            client.list_topics(timeout=START_SECONDS)
        except KafkaException:
            self._check_alive()
            raise

    @abstractmethod
    def stop(self) -> None:
        """A clean shutdown; blocks until the process is gone."""

    @abstractmethod
    def kill(self) -> None: ...

    @abstractmethod
    def pause(self) -> None:
        """Freezes the process: connections stay open and nothing is answered."""

    @abstractmethod
    def resume(self) -> None: ...

    @abstractmethod
    def close(self) -> None:
        """Ends the broker and removes its data."""

    @abstractmethod
    def read_segment(self, topic: str, partition: int) -> bytes:
        """The first log segment of a partition, as it lies on disk."""

    @abstractmethod
    def write_segment(self, topic: str, partition: int, content: bytes) -> None:
        """Replaces the first log segment; only while the broker is stopped."""

    @abstractmethod
    def _launch(self) -> None: ...

    @abstractmethod
    def _state(self) -> str:
        """`running`, `paused` or `stopped`."""

    def restore(self) -> None:
        """Running and answering again, whatever a test has done to it."""
        if self._state() == "paused":
            self.resume()
        if self._state() == "stopped":
            self._launch()
        self.wait_until_up()

    def _check_alive(self) -> None:
        assert self._state() != "stopped", f"the broker ended: {self._last_words()}"

    def _last_words(self) -> str:
        return ""


class ExternalBroker(Broker):
    """Brokers that someone else runs."""

    kind = "external"
    controllable = False

    def __init__(self, extras: Extras | None = None) -> None:
        if extras:
            raise UnavailableError("an external broker's listeners are its own")
        self.bootstrap = os.environ.get("TEST_KAFKA_BOOTSTRAP", "")
        if not self.bootstrap:
            raise UnavailableError("TEST_KAFKA_BOOTSTRAP is not set")

    def _launch(self) -> None: ...

    def close(self) -> None: ...

    def _refuse(self, *_: object) -> Any:
        raise NotOursError("a broker named in TEST_KAFKA_BOOTSTRAP is not ours to stop or to look into")

    def _state(self) -> str:
        return "running"

    stop = kill = pause = resume = _refuse
    read_segment = write_segment = _refuse


class DockerBroker(Broker):
    """The official image, through testcontainers. The host port is chosen first, so that it can be advertised."""

    kind = "docker"
    log_dir = "/tmp/kafka-logs"
    # Not the image's own script: that one may format at every start, and then refuses a container's second start.
    run = (
        'printf "%s" "$SERVER_PROPERTIES" >/tmp/server.properties; '
        'kafka="java {heap} -cp /opt/kafka/libs/*"; set -f; '
        "$kafka kafka.tools.StorageTool format --ignore-formatted -t {id} -c /tmp/server.properties; "
        "exec $kafka kafka.Kafka /tmp/server.properties"
    )

    def __init__(self, extras: Extras | None = None) -> None:
        from docker.errors import DockerException
        from requests.exceptions import RequestException
        from testcontainers.core.container import DockerContainer
        from testcontainers.core.docker_client import DockerClient

        self._errors = (DockerException, RequestException, OSError)
        try:
            client = DockerClient()
            client.client.ping()
        except self._errors as error:
            raise UnavailableError(f"Docker does not answer: {error}") from error
        host = client.host()
        port = free_port()
        self.bootstrap = f"{'127.0.0.1' if host == 'localhost' else host}:{port}"
        extras = extras or Extras()
        properties = server_properties("0.0.0.0", self.bootstrap, free_port(), self.log_dir, extras)
        self._container = (
            DockerContainer(f"apache/kafka:{VERSION}")
            .with_bind_ports(port, port)
            .with_env("SERVER_PROPERTIES", as_text(properties))
            .with_command(["sh", "-c", self.run.format(heap=HEAP, id=extras.cluster_id)])
        )
        for _, extra in extras.listeners.values():
            self._container.with_bind_ports(extra, extra)
        self._created = False

    def _launch(self) -> None:
        if self._created:
            self._wrapped.start()
            return
        try:
            self._container.start()
        except self._errors as error:
            raise UnavailableError(f"apache/kafka:{VERSION} cannot be run: {error}") from error
        self._created = True
        self._complete()

    def _complete(self) -> None:
        """zstd's native library wants libpthread, which an image built from this machine's own parts may lack."""
        library = Path("/lib") / str(sysconfig.get_config_var("MULTIARCH")) / "libpthread.so.0"
        has = [
            self._wrapped.exec_run(["ls", str(path)]).exit_code == 0
            for path in (library.with_name("libc.so.6"), library)
        ]
        if has == [True, False] and library.exists():
            packed = io.BytesIO()
            with tarfile.open(fileobj=packed, mode="w", dereference=True) as archive:
                archive.add(library, library.name)
            self._wrapped.put_archive(str(library.parent), packed.getvalue())

    @property
    def _wrapped(self) -> Any:
        return self._container.get_wrapped_container()

    def _state(self) -> str:
        self._wrapped.reload()
        status: str = self._wrapped.status
        return status if status in ("running", "paused") else "stopped"

    def _last_words(self) -> str:
        last: bytes = self._wrapped.logs(tail=20)
        return last.decode(errors="replace")

    def stop(self) -> None:
        self._wrapped.stop(timeout=60)

    def kill(self) -> None:
        self._wrapped.kill()
        self._wrapped.wait()

    def pause(self) -> None:
        self._wrapped.pause()

    def resume(self) -> None:
        self._wrapped.unpause()

    def close(self) -> None:
        if self._created:
            self._container.stop()

    def read_segment(self, topic: str, partition: int) -> bytes:
        chunks, _ = self._wrapped.get_archive(f"{self.log_dir}/{segment(topic, partition)}")
        with tarfile.open(fileobj=io.BytesIO(b"".join(chunks))) as archive:
            member = archive.extractfile(archive.getmembers()[0])
            assert member is not None
            return member.read()

    def write_segment(self, topic: str, partition: int, content: bytes) -> None:
        path = Path(self.log_dir) / segment(topic, partition)
        chunks, _ = self._wrapped.get_archive(str(path))
        packed = io.BytesIO()
        with (
            tarfile.open(fileobj=io.BytesIO(b"".join(chunks))) as old,
            tarfile.open(fileobj=packed, mode="w") as new,
        ):
            entry = old.getmembers()[0]  # its owner is the user that the broker runs as
            entry.size = len(content)
            new.addfile(entry, io.BytesIO(content))
        self._wrapped.put_archive(str(path.parent), packed.getvalue())


class JavaBroker(Broker):
    """Apache Kafka's jars on this machine's Java."""

    kind = "java"

    def __init__(self, extras: Extras | None = None) -> None:
        if shutil.which("java") is None:
            raise UnavailableError("there is no java")
        self._classpath = f"{kafka_jars()}/*"
        port = free_port()
        self.bootstrap = f"127.0.0.1:{port}"
        self._home = Path(tempfile.mkdtemp(prefix="kafka-for-tests-"))
        self._log_dir = self._home / "data"
        self._config = self._home / "server.properties"
        extras = extras or Extras()
        properties = server_properties("127.0.0.1", self.bootstrap, free_port(), str(self._log_dir), extras)
        self._cluster_id = extras.cluster_id
        self._config.write_text(as_text(properties))
        self._process: subprocess.Popen[bytes] | None = None
        self._is_paused = False

    def _java(self, main: str, *arguments: str) -> list[str]:
        return ["java", *HEAP.split(), "-XX:+UseSerialGC", "-cp", self._classpath, main, *arguments]

    def _launch(self) -> None:
        with (self._home / "broker.log").open("ab") as log:
            if not self._log_dir.exists():
                arguments = ("format", "-t", self._cluster_id, "-c", str(self._config))
                subprocess.run(self._java("kafka.tools.StorageTool", *arguments), stdout=log, stderr=log, check=True)
            command = self._java("kafka.Kafka", str(self._config))
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self._home, start_new_session=True
            )

    def _state(self) -> str:
        if self._process is None or self._process.poll() is not None:
            return "stopped"
        return "paused" if self._is_paused else "running"

    def _last_words(self) -> str:
        return (self._home / "broker.log").read_text(errors="replace")[-2000:]

    def _send(self, number: signal.Signals) -> "subprocess.Popen[bytes]":
        assert self._process is not None, "start the broker first"
        self._process.send_signal(number)
        return self._process

    def stop(self) -> None:
        self._send(signal.SIGTERM).wait(60)

    def kill(self) -> None:
        self._send(signal.SIGKILL).wait(60)
        self._is_paused = False

    def pause(self) -> None:
        wait_until_frozen(self._send(signal.SIGSTOP).pid)
        self._is_paused = True

    def resume(self) -> None:
        self._send(signal.SIGCONT)
        self._is_paused = False

    def close(self) -> None:
        if self._state() != "stopped":
            self.kill()
        shutil.rmtree(self._home, ignore_errors=True)

    def read_segment(self, topic: str, partition: int) -> bytes:
        return (self._log_dir / segment(topic, partition)).read_bytes()

    def write_segment(self, topic: str, partition: int, content: bytes) -> None:
        (self._log_dir / segment(topic, partition)).write_bytes(content)


KINDS: dict[str, type[ExternalBroker] | type[DockerBroker] | type[JavaBroker]] = {
    broker.kind: broker for broker in (ExternalBroker, DockerBroker, JavaBroker)
}


def start_broker(*, controllable: bool = False, extras: Extras | None = None) -> Broker:
    """A running broker of the first kind that this machine has; UnavailableError with every reason when it has none."""
    reasons = []
    for kind in allowed_kinds(controllable):
        try:
            broker = KINDS[kind](extras if controllable or kind == "external" else steady(extras))
            started(broker)
        except NotOursError:
            raise
        except UnavailableError as reason:
            reasons.append(f"{kind}: {reason}")
        else:
            return broker
    raise UnavailableError("; ".join(reasons))


def steady(extras: Extras | None) -> Extras:
    """For a broker that nobody kills: its own controller does not take it for dead, however busy the machine is."""
    extras = extras or Extras()
    return replace(extras, properties={"broker.session.timeout.ms": "60000", **extras.properties})


def allowed_kinds(controllable: bool) -> list[str]:
    forced = os.environ.get("TEST_KAFKA") or ("external" if os.environ.get("TEST_KAFKA_BOOTSTRAP") else None)
    if forced and forced not in KINDS:
        raise UnavailableError(f"TEST_KAFKA={forced} is none of {', '.join(KINDS)}")
    if controllable and forced and not KINDS[forced].controllable:
        raise NotOursError("this test stops its broker, and the one in TEST_KAFKA_BOOTSTRAP is not ours to stop")
    return [forced] if forced else [kind for kind, broker in KINDS.items() if broker.controllable]


def started(broker: Broker) -> None:
    try:
        broker.start()
    except BaseException:
        broker.close()
        raise


def listens(bootstrap: str) -> bool:
    """Whether one of these addresses takes connections."""
    for address in bootstrap.split(","):
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
        except OSError:
            continue
        return True
    return False


def server_properties(
    interface: str, bootstrap: str, controller_port: int, log_dir: str, extras: Extras
) -> dict[str, str]:
    """One KRaft node. Topics are created on request of any metadata: a client that asks carelessly is found out."""
    host, _, port = bootstrap.rpartition(":")
    listeners = {"PLAINTEXT": ("PLAINTEXT", int(port)), **extras.listeners}
    bound = [f"{name}://{interface}:{port}" for name, (_, port) in listeners.items()]
    protocols = {name: protocol for name, (protocol, _) in listeners.items()} | {"CONTROLLER": "PLAINTEXT"}
    return {
        "node.id": "1",
        "process.roles": "broker,controller",
        "controller.quorum.voters": f"1@localhost:{controller_port}",
        "listeners": ",".join([*bound, f"CONTROLLER://localhost:{controller_port}"]),
        "advertised.listeners": ",".join(
            f"{name}://{extras.advertised.get(name, f'{host}:{port}')}" for name, (_, port) in listeners.items()
        ),
        "listener.security.protocol.map": ",".join(f"{name}:{protocol}" for name, protocol in protocols.items()),
        "controller.listener.names": "CONTROLLER",
        "inter.broker.listener.name": "PLAINTEXT",
        "log.dirs": log_dir,
        "auto.create.topics.enable": "true",
        "num.partitions": "1",
        "offsets.topic.replication.factor": "1",
        "offsets.topic.num.partitions": "4",
        "transaction.state.log.replication.factor": "1",
        "transaction.state.log.min.isr": "1",
        "transaction.state.log.num.partitions": "4",
        "broker.session.timeout.ms": "5000",
        "broker.heartbeat.interval.ms": "1000",
        "group.initial.rebalance.delay.ms": "0",
        "group.min.session.timeout.ms": "1000",
        # By default Kafka maps 10 MiB for each of a partition's two indexes, and first writes to them at its second batch. A
        # disk that reads 8 MiB ahead then fills as much with zeros: some milliseconds for each new partition.
        "log.index.size.max.bytes": str(2**18),
        **extras.properties,
    }


def as_text(properties: dict[str, str]) -> str:
    return "".join(f"{name}={value}\n" for name, value in properties.items())


def segment(topic: str, partition: int) -> str:
    return f"{topic}-{partition}/{0:020}.log"


_reserved: list[TextIO] = []  # files that say which ports are this process's, until it ends


def free_port() -> int:
    """A port that no other process of the tests gets while this one lives, also while a broker of it is stopped.

    It is below the ephemeral range, so that no outgoing connection takes it either.
    """
    folder = Path(tempfile.gettempdir()) / f"sentiment-worker-ports-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    while True:
        port = random.randrange(20_000, 32_000)
        file = (folder / str(port)).open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.socket() as candidate:
                candidate.bind(("127.0.0.1", port))
        except OSError:
            file.close()
            continue
        _reserved.append(file)
        return port


def kafka_jars() -> Path:
    """The folder with Kafka's jars: fetched once, kept in the user's cache."""
    return maven.kept(f"kafka-{VERSION}", fetch_jars)


def fetch_jars(folder: Path) -> None:
    maven.fetch_jars(POM, folder, f"-Dkafka.version={VERSION}")
