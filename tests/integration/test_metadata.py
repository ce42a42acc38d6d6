"""Whose metadata is asked for: in a large cluster that of all topics costs its brokers, and the event loop, a lot."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.process import Workers, environment
from tests.support.topics import Kafka, Topics, numbered
from tests.support.waiting import wait_for
from worker.kafka.subscription import TOPICS_INTERVAL_S

pytestmark = pytest.mark.kafka


@pytest.fixture
def worker_module() -> str:
    return "tests.support.recorded_requests"


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    return tmp_path / "asked"


def names_of(asked: Path) -> set[str | None]:
    """Every topic whose metadata was asked for; None among them for all of the cluster."""
    requests = [json.loads(line) for line in asked.read_text().splitlines()]
    return {name for _, topics in requests for name in ([None] if topics is None else topics)}


@pytest.mark.parametrize("delivery", ["at-least-once", "exactly-once"])
def test_a_worker_asks_for_the_topics_that_it_uses(
    kafka: Kafka, topics: Topics, workers: Workers, asked: Path, delivery: str
) -> None:
    kafka.create_all(topics, 2)
    worker = workers.start(topics, delivery=delivery).wait_until_assigned(2)
    kafka.send(topics.input, map(numbered, range(100)))
    wait_for(lambda: worker.metrics.outcomes == 100, "the results")
    assert worker.terminate() == 0
    assert names_of(asked) == {topics.input, topics.output, topics.dead_letters}


def test_a_pattern_is_compared_with_the_names_of_all_topics_rarely(
    kafka: Kafka, topics: Topics, workers: Workers, asked: Path
) -> None:
    kafka.create_all(topics, 2)
    began = time.monotonic()
    worker = workers.start(topics, input_topics=None, input_pattern=topics.input).wait_until_assigned(2)
    kafka.send(topics.input, map(numbered, range(100)))
    wait_for(lambda: worker.metrics.outcomes == 100, "the results")
    assert worker.terminate() == 0
    requests = [json.loads(line) for line in asked.read_text().splitlines()]
    assert names_of(asked) == {None, topics.input, topics.output, topics.dead_letters}
    assert ["MetadataRequest", None] not in requests, "its answer is parsed on the event loop, partition by partition"
    later = (time.monotonic() - began) / TOPICS_INTERVAL_S
    assert requests.count(["TopicsRequest", None]) <= 2 + later, (
        "at the start, perhaps once more, and once in each interval"
    )


@pytest.mark.parametrize("command", ["check", "replay"])
def test_commands_ask_for_the_topics_that_they_use(kafka: Kafka, topics: Topics, asked: Path, command: str) -> None:
    kafka.create_all(topics, 2)
    flags = {"bootstrap-servers": kafka.bootstrap, "dead-letter-topic": topics.dead_letters, "group-id": topics.group}
    if command == "check":
        flags |= {"input-topics": topics.input, "output-topic": topics.output, "model": "builtin", "http-port": "0"}
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.recorded_requests", command, *arguments],
        env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    used = {topics.dead_letters} | ({topics.input, topics.output} if command == "check" else set())
    assert names_of(asked) == used
