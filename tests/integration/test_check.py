"""`sentiment-worker check` beside a real Kafka: a line for each thing, and the exit code."""

import pytest

from tests.broker import free_port
from tests.test_command_line import MODULE, call
from tests.topics import Kafka, Topics

pytestmark = pytest.mark.kafka


def lines_of(printed: str) -> dict[str, str]:
    """The verdict of each subject; of several lines the worst."""
    order = ("ok", "warn", "fail")
    verdicts: dict[str, str] = {}
    for line in printed.splitlines():
        verdict, subject = line.split()[:2]
        verdicts[subject] = max(verdict, verdicts.get(subject, "ok"), key=order.index)
    return verdicts


def flags(kafka: Kafka, topics: Topics) -> list[object]:
    return [
        "--bootstrap-servers", kafka.bootstrap, "--model", "builtin", "--http-port", 0, "--group-id", topics.group,
        "--input-topics", topics.input, "--output-topic", topics.output, "--dead-letter-topic", topics.dead_letters,
    ]  # fmt: skip


@pytest.mark.parametrize("delivery", ["at-least-once", "exactly-once"])
def test_what_is_fit_is_said_to_be_and_nothing_is_written(kafka: Kafka, topics: Topics, delivery: str) -> None:
    kafka.create_all(topics)
    done = call("check", *flags(kafka, topics), "--delivery", delivery)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(lines_of(done.stdout)) == {
        "settings", "disk", "http", "model", "brokers", "topics", "replicas", "files", "workers", "permissions"
    }  # fmt: skip
    assert lines_of(done.stdout)["replicas"] == "warn"  # there is one broker
    assert f"WRITE on topic {topics.output}" in done.stdout
    assert ("transactional id" in done.stdout) == (delivery == "exactly-once")
    assert kafka.read(topics.output) == kafka.read(topics.dead_letters) == []


def test_few_open_files_for_many_partitions_are_warned_of(kafka: Kafka, topics: Topics) -> None:
    kafka.create_all(topics, 40)
    limited = ("bash", "-c", 'ulimit -Sn 100 && ulimit -Hn 120 && exec "$@"', "-", *MODULE)
    done = call("check", *flags(kafka, topics), "--delivery", "exactly-once", program=limited)
    assert lines_of(done.stdout)["files"] == "warn", done.stdout + done.stderr
    assert "120 files may be open, and 40 partitions may need 147" in done.stdout
    assert done.returncode == 0


def test_a_missing_topic_fails_and_is_not_created(kafka: Kafka, topics: Topics) -> None:
    done = call("check", *flags(kafka, topics))
    assert done.returncode == 1
    assert lines_of(done.stdout)["topics"] == "fail"
    assert f"output_topic: topic {topics.output} does not exist" in done.stdout
    again = call("check", *flags(kafka, topics))
    assert f"output_topic: topic {topics.output} does not exist" in again.stdout


def test_brokers_that_are_away_fail(kafka: Kafka, topics: Topics) -> None:
    where = f"127.0.0.1:{free_port()}"
    done = call("check", *flags(kafka, topics), "--bootstrap-servers", where, "--request-timeout-ms", 2_000)
    assert done.returncode == 1
    assert f"{where} cannot be reached" in done.stdout


def test_a_checkpoint_that_is_none_fails_and_the_brokers_are_looked_at_all_the_same(
    kafka: Kafka, topics: Topics
) -> None:
    kafka.create_all(topics)
    done = call("check", *flags(kafka, topics), "--model", "/nowhere/at/all")
    assert done.returncode == 1
    assert lines_of(done.stdout)["model"] == "fail"
    assert "there is no such folder" in done.stdout
    assert lines_of(done.stdout)["permissions"] == "ok"
