"""Addresses that cannot be used: which one fails, who gave it, and what to do, from each command and while running."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from tests.conftest import broker_or_reason
from tests.support.broker import Broker, Extras, free_port
from tests.support.process import COSTLESS, Workers, forked, workers_in
from tests.support.topics import Kafka, Topics
from tests.support.waiting import wait_for

pytestmark = pytest.mark.kafka

NOWHERE = "kafka.invalid:9092"
ADVERTISED = f"{NOWHERE} has a host name that this machine cannot resolve (broker 1 gives it as its advertised listener"
OUTSIDE_PORT = free_port()


@pytest.fixture(scope="module")
def lost_broker(request: pytest.FixtureRequest) -> Iterator[Broker]:
    """A broker that sends who comes by its second listener to a host that there is not."""
    extras = Extras(listeners={"OUTSIDE": ("PLAINTEXT", OUTSIDE_PORT)}, advertised={"OUTSIDE": NOWHERE})
    broker = broker_or_reason(request.config, controllable=True, extras=extras)
    yield broker
    broker.close()


@pytest.fixture
def outside(lost_broker: Broker) -> str:
    return f"{lost_broker.bootstrap.rpartition(':')[0]}:{OUTSIDE_PORT}"


@pytest.fixture
def lost_workers(lost_broker: Broker, tmp_path: Path) -> Iterator[Workers]:
    with workers_in(lost_broker.bootstrap, Path("builtin"), tmp_path, COSTLESS, is_forked=True) as workers:
        yield workers


def names_of(topics: Topics) -> list[str]:
    return ["--input-topics", topics.input, "--group-id", topics.group, "--dead-letter-topic", topics.dead_letters]


def replayed(topics: Topics, bootstrap: str) -> "subprocess.CompletedProcess[str]":
    flags = ["--bootstrap-servers", bootstrap, "--request-timeout-ms", "6000"]
    names = ["--dead-letter-topic", topics.dead_letters, "--group-id", topics.group]
    return forked("replay", *flags, *names)


def test_check_says_that_the_brokers_own_address_is_wrong(topics: Topics, outside: str) -> None:
    flags = ["--bootstrap-servers", outside, "--model", "builtin", "--http-port", "0", "--request-timeout-ms", "6000"]
    done = forked("check", *flags, *names_of(topics))
    (line,) = [line for line in done.stdout.splitlines() if line.split()[:2] == ["fail", "brokers"]]
    assert ADVERTISED in line
    assert "set advertised.listeners of that broker" in line
    assert done.returncode == 1


def test_a_worker_says_that_the_brokers_own_address_is_wrong(
    topics: Topics, outside: str, lost_workers: Workers
) -> None:
    worker = lost_workers.start(topics, bootstrap_servers=outside, request_timeout_ms=3_000)
    wait_for(lambda: worker.warnings(ADVERTISED), "the sentence")
    wait_for(lambda: ADVERTISED in worker.get("/readyz")[1], "the sentence at /readyz")
    assert worker.status("/livez") == 200


@pytest.mark.parametrize("kind", ["refused", "advertised"])
def test_a_replay_ends_where_no_broker_can_be_used(topics: Topics, outside: str, kind: str) -> None:
    refused = f"127.0.0.1:{free_port()}"
    done = replayed(topics, refused if kind == "refused" else outside)
    assert done.returncode == 1
    last = orjson.loads(done.stderr.splitlines()[-1])
    assert last["message"].startswith("no broker could be used for 12 s: ")
    assert (f"{refused} refuses connections" if kind == "refused" else ADVERTISED) in done.stderr.splitlines()[-1]


def test_while_running_it_is_said_why_brokers_are_away(
    topics: Topics, lost_broker: Broker, lost_workers: Workers
) -> None:
    Kafka(lost_broker.bootstrap).create_all(topics, 1)
    worker = lost_workers.start(topics).wait_until_assigned(1)
    lost_broker.kill()
    words = f"{lost_broker.bootstrap} refuses connections: nothing listens there (bootstrap_servers names it)"
    wait_for(lambda: worker.warnings(words), "the sentence")
    wait_for(lambda: words in worker.get("/readyz")[1], "the sentence at /readyz")
    assert len(worker.warnings(words)) == 1
    lost_broker.restore()
    worker.wait_until_ready()
    assert worker.terminate() == 0
