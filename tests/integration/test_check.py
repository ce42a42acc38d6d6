"""`sentiment-worker check` beside a real Kafka: a line for each thing, and the exit code."""

import socket
from pathlib import Path

import pytest

from tests.support.broker import free_port
from tests.support.process import COSTLESS, Workers, forked
from tests.support.scenario import wait_until_committed
from tests.support.topics import Kafka, Record, Topics, numbered
from tests.support.waiting import wait_for

pytestmark = pytest.mark.kafka
PATIENT = {"INTERVALS": '{"ASK_S": 120}'}  # else a busy machine's worker begins without a word on where


@pytest.fixture
def worker_module() -> str:
    return COSTLESS


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
    done = forked("check", *flags(kafka, topics), "--delivery", delivery)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(lines_of(done.stdout)) == {
        "settings", "disk", "http", "model", "brokers", "topics", "replicas", "files", "workers", "offsets", "permissions"
    }  # fmt: skip
    assert lines_of(done.stdout)["replicas"] == "warn"  # there is one broker
    assert f"WRITE on topic {topics.output}" in done.stdout
    assert ("transactional id" in done.stdout) == (delivery == "exactly-once")
    assert kafka.read(topics.output) == kafka.read(topics.dead_letters) == []


def test_few_open_files_are_warned_of(kafka: Kafka, topics: Topics) -> None:
    kafka.create_all(topics, 40)
    done = forked("check", *flags(kafka, topics), "--delivery", "exactly-once", open_files=(60, 69))
    assert lines_of(done.stdout)["files"] == "warn", done.stdout + done.stderr
    assert "69 files may be open, and a worker may need 70 beside 1 broker" in done.stdout
    assert done.returncode == 0


def test_an_output_that_takes_nothing_fails(kafka: Kafka, topics: Topics) -> None:
    kafka.create_all(topics)
    kafka.set_config(topics.output, "min.insync.replicas", 2)
    done = forked("check", *flags(kafka, topics))
    assert (done.returncode, lines_of(done.stdout)["replicas"]) == (1, "fail")
    assert f"{topics.output} has 1 replica in sync, and min.insync.replicas 2: brokers accept nothing" in done.stdout


def test_a_missing_topic_fails_and_is_not_created(kafka: Kafka, topics: Topics) -> None:
    done = forked("check", *flags(kafka, topics))
    assert done.returncode == 1
    assert lines_of(done.stdout)["topics"] == "fail"
    assert f"output_topic: topic {topics.output} does not exist" in done.stdout
    again = forked("check", *flags(kafka, topics))
    assert f"output_topic: topic {topics.output} does not exist" in again.stdout


@pytest.mark.parametrize("reset", ["earliest", "latest"])
def test_where_a_group_begins_is_said_with_the_records_that_are_before_it(
    kafka: Kafka, topics: Topics, workers: Workers, reset: str
) -> None:
    kafka.create_all(topics, 2)
    kafka.send(topics.input, map(numbered, range(30)))
    new = f"group {topics.group} has no committed offset: it begins at the {reset}, 30 records in 2 partitions"
    done = forked("check", *flags(kafka, topics), "--auto-offset-reset", reset)
    assert f"warn  offsets      {new}{' that are skipped' * (reset == 'latest')}\n" in done.stdout
    worker = workers.start(topics, PATIENT, auto_offset_reset=reset).wait_until_assigned(2)
    assert worker.lines(new)
    if reset == "earliest":
        wait_until_committed(kafka, topics)
    else:
        wait_for(lambda: len(kafka.committed(topics.group, topics.input)) == 2, "where it began to be committed")
    assert worker.terminate() == 0
    kafka.send(topics.input, map(numbered, range(5)))
    done = forked("check", *flags(kafka, topics))
    known = f"group {topics.group} goes on from its committed offsets: 5 records in 2 partitions"
    assert f"ok    offsets      {known}\n" in done.stdout
    again = workers.start(topics, PATIENT)
    wait_for(lambda: again.lines(known), "the line")


def test_a_run_with_an_end_is_looked_at(kafka: Kafka, topics: Topics, workers: Workers) -> None:
    kafka.create_all(topics, 1)
    end_ms = 1_767_225_600_000
    kafka.send(topics.input, [Record(b'{"text": "x"}', timestamp=end_ms - (30 - n) * 60_000) for n in range(30)])
    span = ("--since", "2025-12-31T23:50Z", "--until", "2026-01-01")
    done = forked("check", *flags(kafka, topics), *span)
    begin = "at the first record of 2025-12-31T23:50:00.000Z or later, 10 records in 1 partition"
    assert f"ok    offsets      group {topics.group} has no committed offset: it begins {begin}\n" in done.stdout
    assert done.returncode == 0, done.stdout
    assert workers.start(topics, since=span[1], until=span[3]).wait() == 0
    done = forked("check", *flags(kafka, topics), "--until", "2026-01-02")
    assert (done.returncode, lines_of(done.stdout)["offsets"]) == (2, "fail"), done.stdout
    assert "has offsets of a run until 2026-01-01T00:00:00.000Z" in done.stdout


def test_a_topic_that_is_named_twice_counts_once(kafka: Kafka, topics: Topics) -> None:
    kafka.create_all(topics, 3)
    names = f"{topics.input},{topics.input}"
    done = forked("check", *flags(kafka, topics), "--input-topics", names)
    if done.returncode != 2:  # refused by the settings
        assert "work for up to 3" in done.stdout
        assert done.stdout.count(f"READ on topic {topics.input}") == 1


def test_it_fits_beside_a_running_worker(kafka: Kafka, topics: Topics, workers: Workers) -> None:
    kafka.create_all(topics)
    worker = workers.start(topics).wait_until_ready()
    port = worker.url.rpartition(":")[2]
    done = forked("check", *flags(kafka, topics), "--http-port", port)
    if lines_of(done.stdout)["http"] == "fail":  # it gives the worker two seconds, too few on a busy machine
        done = forked("check", *flags(kafka, topics), "--http-port", port)
    assert f"127.0.0.1:{port} is a sentiment-worker's that runs" in done.stdout
    assert (lines_of(done.stdout)["http"], done.returncode) == ("warn", 0)


def test_an_instance_id_that_a_member_holds_is_warned_of(kafka: Kafka, topics: Topics, workers: Workers) -> None:
    kafka.create_all(topics)
    workers.start(topics, group_instance_id="pod-0").wait_until_assigned(4)
    for instance_id, is_taken in (("pod-0", True), ("pod-1", False)):
        done = forked("check", *flags(kafka, topics), "--group-instance-id", instance_id)
        assert (f"a member of the group has the group_instance_id {instance_id}" in done.stdout) == is_taken
        assert done.returncode == 0


def test_internal_topics_without_replicas_are_warned_of_where_transactions_need_them(
    kafka: Kafka, topics: Topics
) -> None:
    kafka.create_all(topics)
    for delivery, is_said in (("exactly-once", True), ("at-least-once", False)):
        done = forked("check", *flags(kafka, topics), "--delivery", delivery)
        assert ("__transaction_state has one replica a partition" in done.stdout) == is_said, done.stdout


def test_a_port_that_another_program_has_fails(kafka: Kafka, topics: Topics) -> None:
    kafka.create_all(topics)
    with socket.create_server(("127.0.0.1", 0)) as other:
        done = forked("check", *flags(kafka, topics), "--http-port", other.getsockname()[1])
    assert (lines_of(done.stdout)["http"], done.returncode) == ("fail", 1)


def test_brokers_that_are_away_fail(kafka: Kafka, topics: Topics) -> None:
    where = f"127.0.0.1:{free_port()}"
    done = forked("check", *flags(kafka, topics), "--bootstrap-servers", where, "--request-timeout-ms", 2_000)
    assert done.returncode == 1
    assert f"{where} refuses connections" in done.stdout


def test_a_checkpoint_that_is_none_fails_and_the_brokers_are_looked_at_all_the_same(
    kafka: Kafka, topics: Topics
) -> None:
    kafka.create_all(topics)
    done = forked("check", *flags(kafka, topics), "--model", "/nowhere/at/all")
    assert done.returncode == 2, "as that of run"
    assert lines_of(done.stdout)["model"] == "fail"
    assert "there is no such folder" in done.stdout
    assert lines_of(done.stdout)["permissions"] == "ok"


def test_each_wrong_setting_has_a_line(kafka: Kafka, topics: Topics) -> None:
    done = forked(
        "check", *flags(kafka, topics), "--linger-ms", "-1", "--log-level", "loud", "--max-batch-texts", "many"
    )
    assert (done.returncode, done.stderr) == (2, "")
    wrong = {"linger_ms", "log_level", "max_batch_texts"}
    assert sorted(line.split()[:3] for line in done.stdout.splitlines()) == [
        ["fail", "settings", name] for name in sorted(wrong)
    ]


def test_what_the_machine_cannot_use_is_a_line_too_and_the_rest_is_looked_at(
    kafka: Kafka, topics: Topics, tmp_path: Path
) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    done = forked("check", *flags(kafka, topics), "--security-protocol", "SSL", "--ssl-cafile", tmp_path / "ca.pem")
    assert (done.returncode, done.stderr) == (2, "")
    assert lines_of(done.stdout)["settings"] == "fail"
    assert "ssl_cafile" in done.stdout
    assert lines_of(done.stdout)["model"] == "ok"


def test_brokers_that_want_something_else_are_a_line_too(kafka: Kafka, topics: Topics) -> None:
    login = ["--security-protocol", "SASL_PLAINTEXT", "--sasl-mechanism", "PLAIN", "--sasl-username", "me"]
    done = forked("check", *flags(kafka, topics), *login, WORKER_SASL_PASSWORD="a-word")
    assert (done.returncode, done.stderr) == (2, "")
    assert lines_of(done.stdout)["brokers"] == "fail"
    assert "takes no login at this listener" in done.stdout


def test_open_transactions_of_workers_of_before_fail(kafka: Kafka, topics: Topics) -> None:
    """They had a transactional id for each input partition. Those of workers of today are none of them."""
    kafka.create_all(topics, 2)
    producers = []
    for name in (f"{topics.input}/1", "member/1", f"{topics.input}"):
        producers.append(kafka.begin_transaction(f"{topics.group}/{name}"))
        producers[-1].produce(topics.output, b"x")
        producers[-1].flush(30)
    done = forked("check", *flags(kafka, topics), "--delivery", "exactly-once")
    assert done.returncode == 1
    assert f"workers before 0.2.0 have open transactions, such as {topics.group}/{topics.input}/1" in done.stdout
    for producer in producers:
        producer.abort_transaction(60)

    def again() -> dict[str, str]:
        return lines_of(forked("check", *flags(kafka, topics), "--delivery", "exactly-once").stdout)

    wait_for(lambda: "transactions" not in again(), "brokers to have ended what they were told to abort")
