"""Logins by token, with Keycloak and a Kafka that takes its tokens: renewal, refusals, outages, and nothing is lost."""

import asyncio
import base64
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.chaos.proxy import Proxy
from tests.support.broker import free_port
from tests.support.component import available
from tests.support.keycloak import AUDIENCE, SECRET, Keycloak, OAuthBroker, running_broker, running_keycloak
from tests.support.process import COSTLESS, WorkerProcess, Workers, forked, workers_in
from tests.support.scenario import places, wait_until_committed
from tests.support.topics import Kafka, Load, Topics, numbered
from tests.support.waiting import holds_for, wait_for

pytestmark = [pytest.mark.kafka, pytest.mark.reach, pytest.mark.timeout(900)]

LIFETIME_S: Final = 8  # of a token
SESSION_S: Final = 4  # after which the broker ends a connection
TOKENS: Final = 5  # that a worker fetches while it is under load
WORKER, STRANGER = "worker", "stranger"


@pytest.fixture(scope="module")
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def keycloak(stack: contextlib.ExitStack) -> Keycloak:
    keycloak = available(lambda: stack.enter_context(running_keycloak()), "Keycloak")
    keycloak.create_realm(LIFETIME_S, {WORKER: AUDIENCE, STRANGER: "somebody-else"})
    return keycloak


@pytest.fixture(scope="module")
def oauth_broker(stack: contextlib.ExitStack, keycloak: Keycloak) -> OAuthBroker:
    return available(lambda: stack.enter_context(running_broker(keycloak, SESSION_S)), "Kafka")


@pytest.fixture
def kafka(oauth_broker: OAuthBroker) -> Kafka:
    """The tests' own client, at the plain listener."""
    return Kafka(oauth_broker.bootstrap)


@pytest.fixture
def oauth_workers(oauth_broker: OAuthBroker, tmp_path: Path) -> Iterator[Workers]:
    with workers_in(oauth_broker.entrance, Path("builtin"), tmp_path, COSTLESS, is_forked=True) as workers:
        yield workers


def by_secret(keycloak: Keycloak, client_id: str = WORKER, port: int | None = None) -> dict[str, Any]:
    """The settings of a worker that logs in as a client; `port` is that of a way to Keycloak."""
    return {
        "security_protocol": "SASL_PLAINTEXT",
        "sasl_mechanism": "OAUTHBEARER",
        "oauth_token_url": f"http://127.0.0.1:{port or keycloak.port}{keycloak.token_path}",
        "oauth_client_id": client_id,
    }


SECRETS: Final = {"WORKER_OAUTH_CLIENT_SECRET": SECRET}


def unforeseen(worker: WorkerProcess) -> list[str]:
    """What the worker itself warns of, but for what these tests have on purpose."""
    own = [
        line["message"]
        for line in worker.logs
        if line["logger"].startswith("worker") and line["level"] not in ("DEBUG", "INFO")
    ]
    return [words for words in own if "nothing is encrypted" not in words]


def has_no_secret(worker: WorkerProcess) -> bool:
    """Nor a token: each begins with the same header."""
    shown = worker.output + "".join(worker.get(path)[1] for path in ("/", "/metrics", "/readyz"))
    login = base64.b64encode(f"{WORKER}:{SECRET}".encode()).decode()
    return not [secret for secret in (SECRET, login, "eyJhbGciOi") if secret in shown]


class Way(Proxy):
    """Leads to Keycloak, and counts who comes."""

    connections = 0

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        await super()._serve(reader, writer)


@pytest.mark.parametrize("delivery", ["at-least-once", "exactly-once"])
def test_every_record_once_across_several_tokens_and_sessions(
    keycloak: Keycloak, kafka: Kafka, topics: Topics, oauth_workers: Workers, delivery: str
) -> None:
    """The broker ends connections all the time, and no token lasts as long as the run."""
    kafka.create_all(topics)
    way = Way(free_port(), f"127.0.0.1:{keycloak.port}")
    try:
        settings = {**by_secret(keycloak, port=way.port), "delivery": delivery, "log_level": "debug"}
        worker = oauth_workers.start(topics, SECRETS, **settings).wait_until_assigned(4)
        load = Load(kafka, topics.input, rate=40)
        load.start()
        wait_for(lambda: way.connections >= TOKENS, f"{TOKENS} tokens", 120)
        sent = load.stop()
        wait_until_committed(kafka, topics)
    finally:
        way.close()
    assert has_no_secret(worker)
    assert worker.terminate() == 0
    assert len(worker.lines("Connection at", "closed")) >= 1  # by the broker, at the end of a session
    assert unforeseen(worker) == []
    assert places(kafka.read(topics.output)) == dict.fromkeys((record.place for record in sent), 1)


@pytest.mark.parametrize(
    ("client_id", "secret", "words"),
    [
        (
            STRANGER,
            SECRET,
            ["the broker", "refuses the token (invalid_token", "aud", "somebody-else", "oauth_audience"],
        ),
        (WORKER, "guessed-by-nobody", ["refuses oauth_client_id 'worker'", "WORKER_OAUTH_CLIENT_SECRET"]),
        ("nobody", SECRET, ["refuses oauth_client_id 'nobody'", "invalid_client"]),
    ],
    ids=["wrong audience", "wrong secret", "unknown client"],
)
@pytest.mark.parametrize("command", ["run", "check", "replay"])
def test_who_is_refused_at_the_start_is_told_so_in_a_sentence(
    keycloak: Keycloak,
    oauth_broker: OAuthBroker,
    topics: Topics,
    tmp_path: Path,
    command: str,
    client_id: str,
    secret: str,
    words: list[str],
) -> None:
    settings = {
        **by_secret(keycloak, client_id),
        "bootstrap_servers": oauth_broker.entrance,
        "dead_letter_topic": topics.dead_letters,
    }
    if command != "replay":
        settings |= {"model": "builtin", "http_port": 0}
    flags = [word for name, value in settings.items() for word in ("--" + name.replace("_", "-"), str(value))]
    (tmp_path / "secret").write_text(secret + "\n")
    done = forked(command, *flags, WORKER_OAUTH_CLIENT_SECRET_FILE=str(tmp_path / "secret"))
    printed = done.stdout + done.stderr
    assert done.returncode == 2
    sentence = next(line for line in printed.splitlines() if words[1] in line)
    assert all(word in sentence for word in words)
    assert "Traceback" not in printed
    assert secret not in printed
    assert "eyJhbGciOi" not in printed


def test_check_fails_where_the_provider_cannot_be_reached() -> None:
    """That is no wrong setting, and nobody is asked for brokers without a token."""
    port = free_port()
    flags = [f"--oauth-token-url=http://127.0.0.1:{port}/token", "--oauth-client-id=worker", "--model=builtin"]
    login = ["--security-protocol=SASL_PLAINTEXT", "--sasl-mechanism=OAUTHBEARER", "--http-port=0"]
    done = forked("check", *login, *flags, **SECRETS)
    reason = f"the token endpoint http://127.0.0.1:{port}/token cannot be reached (Connection refused)"
    assert f"fail  brokers      {reason}" in done.stdout
    assert done.returncode == 1
    assert SECRET not in done.stdout + done.stderr


def test_a_client_that_is_revoked_and_restored_goes_on_where_it_was(
    keycloak: Keycloak, kafka: Kafka, topics: Topics, oauth_workers: Workers
) -> None:
    kafka.create_all(topics)
    settings = {**by_secret(keycloak), "delivery": "exactly-once"}
    worker = oauth_workers.start(topics, SECRETS, **settings).wait_until_assigned(4)
    load = Load(kafka, topics.input, rate=50)
    load.start()
    wait_for(lambda: worker.metrics.outcomes > 0, "the first results")
    keycloak.enable(WORKER, False)
    try:
        wait_for(lambda: "refuses oauth_client_id 'worker'" in worker.get("/readyz")[1], "the reason in /readyz", 60)
        holds_for(lambda: (worker.status("/livez"), worker.status("/readyz")) == (200, 503), "it waits", 5)
        assert len(worker.warnings("refuses oauth_client_id")) <= 3
    finally:
        keycloak.enable(WORKER, True)
    worker.wait_until_ready()
    sent = load.stop()
    wait_until_committed(kafka, topics)
    assert has_no_secret(worker)
    assert "Traceback" not in worker.output
    assert worker.terminate() == 0
    assert places(kafka.read(topics.output)) == dict.fromkeys((record.place for record in sent), 1)


def test_a_provider_that_is_down_at_the_start_and_later_is_waited_for(
    keycloak: Keycloak, kafka: Kafka, topics: Topics, oauth_workers: Workers
) -> None:
    kafka.create_all(topics)
    kafka.send(topics.input, map(numbered, range(99)))
    port = free_port()
    worker = oauth_workers.start(topics, SECRETS, **by_secret(keycloak, port=port))
    reason = f"login: the token endpoint http://127.0.0.1:{port}"
    wait_for(lambda: reason in worker.get("/readyz")[1], "the reason in /readyz", 60)
    holds_for(lambda: (worker.status("/livez"), worker.status("/readyz")) == (200, 503), "it waits", 5)
    way = Way(port, f"127.0.0.1:{keycloak.port}")
    try:
        worker.wait_until_assigned(4)
        wait_until_committed(kafka, topics)
        way.set(refuses=True)
        wait_for(lambda: reason in worker.get("/readyz")[1], "the reason in /readyz again", 60)
        before = way.connections
        holds_for(lambda: worker.status("/readyz") == 503, "it waits", 10)
        assert way.connections - before <= 6  # though all clients try to log in all the time
        kafka.send(topics.input, map(numbered, range(99, 198)))
        way.set()
        worker.wait_until_ready()
        wait_until_committed(kafka, topics)
    finally:
        way.close()
    assert has_no_secret(worker)
    assert worker.terminate() == 0
    assert set(places(kafka.read(topics.output)).values()) == {1}
    assert kafka.count(topics.output) == 198


class Renewer(threading.Thread):
    """Puts a fresh token of `client_id` into a file, again and again, as a sidecar does; of nobody at first."""

    def __init__(self, keycloak: Keycloak, file: Path) -> None:
        super().__init__(daemon=True)
        self._keycloak, self._file = keycloak, file
        self._ending = threading.Event()
        self.client_id = ""

    def renew(self, client_id: str) -> None:
        scratch = self._file.with_suffix(".new")
        scratch.write_text(self._keycloak.token(client_id) + "\n")
        scratch.replace(self._file)

    def run(self) -> None:
        while not self._ending.wait(LIFETIME_S / 8):
            if self.client_id:
                self.renew(self.client_id)

    def end(self) -> None:
        self._ending.set()
        self.join()


def test_a_file_that_something_else_renews(
    keycloak: Keycloak, kafka: Kafka, topics: Topics, oauth_workers: Workers, tmp_path: Path
) -> None:
    """First nobody renews it, then somebody whose tokens the broker refuses, then the right one over several tokens."""
    renewer = Renewer(keycloak, tmp_path / "token")
    renewer.renew(WORKER)
    kafka.create_all(topics)
    settings = {
        "security_protocol": "SASL_PLAINTEXT",
        "sasl_mechanism": "OAUTHBEARER",
        "oauth_token_file": tmp_path / "token",
    }
    worker = oauth_workers.start(topics, **settings)
    renewer.start()
    try:
        renewer.client_id = WORKER
        worker.wait_until_assigned(4)
        kafka.send(topics.input, map(numbered, range(99)))
        wait_until_committed(kafka, topics)
        renewer.client_id = ""
        wait_for(lambda: "holds a token that expired" in worker.get("/readyz")[1], "a token that has expired", 60)
        renewer.client_id = STRANGER
        wait_for(lambda: "refuses the token" in worker.get("/readyz")[1], "the broker's refusal in /readyz", 90)
        kafka.send(topics.input, map(numbered, range(99, 198)))
        renewer.client_id = WORKER
        worker.wait_until_ready()
        wait_until_committed(kafka, topics)
        holds_for(lambda: worker.status("/readyz") == 200, "it is ready over several tokens", 2 * LIFETIME_S)
    finally:
        renewer.end()
    assert worker.terminate() == 0
    assert "eyJhbGciOi" not in worker.output
    assert set(places(kafka.read(topics.output)).values()) == {1}
    assert kafka.count(topics.output) == 198
