"""Dead letters go back to their topics, each once, with all that they had; whatever interrupts the replay."""

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from typing import get_args

import orjson
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.structs import OffsetAndMetadata

from tests.support.process import COSTLESS, Workers, environment, forked
from tests.support.scenario import wait_until_committed
from tests.support.topics import Kafka, Record, Topics, repeated
from tests.support.waiting import wait_for
from worker.reasons import Reason

pytestmark = pytest.mark.kafka


@pytest.fixture
def worker_module() -> str:
    return COSTLESS


HOUR_MS = 3_600_000
REASONS = ("missing_text", "empty_text", "text_not_string")
BODIES = (b'{"id": %d, "body": "a"}', b'{"id": %d, "text": " ", "body": "b"}', b'{"other": %d, "text": 1, "body": "c"}')


def dead_letter(number: int, topics: Topics, reason: str = "missing_text", *more: tuple[str, bytes]) -> Record:
    """As the worker writes it."""
    added = {
        "error.stage": "decode", "error.reason": reason, "error.message": "why", "source.topic": topics.input,
        "source.partition": "3", "source.offset": str(number), "source.timestamp": str(1_700_000_000_000 + number),
        "worker.version": "0.1.0",
    }  # fmt: skip
    own = (("trace", b"%d" % number), ("source.topic", b"the input's own"), ("event.id", b"old"))
    headers = (*own, *((name, value.encode()) for name, value in added.items()), *more)
    return Record(b'{"id": %d, "text": 1}' % number, b"key %d" % (number % 20), headers)


def flags(kafka: Kafka, topics: Topics) -> list[str]:
    names = ["--dead-letter-topic", topics.dead_letters, "--group-id", topics.group]
    return ["--bootstrap-servers", kafka.bootstrap, *names]


def command(kafka: Kafka, topics: Topics, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "worker", "replay", *flags(kafka, topics), *arguments]


def replay(kafka: Kafka, topics: Topics, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return forked("replay", *flags(kafka, topics), *arguments)


def counted(done: "subprocess.CompletedProcess[str]") -> dict[str, list[int]]:
    """The rows of the table."""
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in done.stdout.splitlines() if "│" in line]
    return {row[0]: [int(cell) for cell in row[1:]] for row in rows}


def trace(record: Record) -> int:
    return int(dict(record.headers)["trace"] or b"")


def test_what_the_worker_could_not_score_is_scored_after_its_settings_are_mended(
    kafka: Kafka, topics: Topics, workers: Workers
) -> None:
    kafka.create_all(topics, 4)
    bad = [
        Record(
            BODIES[number % 3] % number, None if number % 5 == 0 else b"k%d" % number, (("h", b"1"),), 1_700_000_000_000
        )
        for number in range(90)
    ]
    sent = kafka.send(topics.input, bad)
    first = workers.start(topics, dead_letter_limit=0)
    wait_until_committed(kafka, topics)
    assert first.terminate() == 0

    dry = replay(kafka, topics, "--dry-run")
    assert (dry.returncode, dry.stderr) == (0, "")
    assert counted(dry) == {**{reason: [30, 0, 0, 0] for reason in REASONS}, "all": [90, 0, 0, 0]}
    assert kafka.count(topics.input) == 90, "a dry run sends nothing"
    assert kafka.committed(f"{topics.group}.replay", topics.dead_letters) == {}

    began_at = int(time.time() * 1000)
    one = replay(kafka, topics, "--reason", "empty_text")
    assert (one.returncode, counted(one)) == (0, {"empty_text": [30, 0, 0, 0], "all": [30, 0, 0, 0]})
    rest = replay(kafka, topics)
    assert rest.returncode == 0
    assert counted(rest) == {"missing_text": [30, 0, 0, 0], "text_not_string": [30, 0, 0, 0], "all": [60, 0, 0, 0]}
    assert "30 dead letters had been replayed before" in rest.stdout
    assert counted(replay(kafka, topics)) == {"all": [0, 0, 0, 0]}

    by_value = {record.value: record for record in sent}
    again = kafka.read(topics.input)
    replayed = [record for record in again if record.place not in {one.place for one in sent}]
    assert Counter(record.value for record in replayed) == Counter(by_value.keys())
    for record in replayed:
        origin = by_value[record.value]
        fields = orjson.loads(record.value or b"")
        id = str(fields["id"]) if "id" in fields else "{}-{}-{}".format(*origin.place)
        first = ("event.timestamp", b"%d" % origin.timestamp)
        assert list(record.headers) == [("h", b"1"), ("event.id", id.encode()), ("replay.count", b"1"), first]
        assert (record.key, record.partition) == (origin.key, origin.partition)
        assert record.timestamp >= began_at, "no retention may take it before a worker reads it"

    workers.start(topics, text_field="body", auto_offset_reset="earliest")
    wait_until_committed(kafka, topics)
    results = [orjson.loads(record.value or b"") for record in kafka.read(topics.output)]
    assert {result["event_time"] for result in results} == {"2023-11-14T22:13:20.000Z"}
    assert all(record.timestamp >= began_at for record in kafka.read(topics.output)), "a result's is its input's"
    assert Counter(result["id"] for result in results) == Counter(
        dict(record.headers)["event.id"].decode()
        for record in replayed  # type: ignore[union-attr]
    )


def test_what_dies_again_counts_its_replays(kafka: Kafka, topics: Topics, workers: Workers) -> None:
    kafka.create_all(topics, 1)
    kafka.send(topics.input, [Record(b"{", b"key", (("error.reason", b"mine"), ("source.topic", b"mine")))])
    workers.start(topics, dead_letter_limit=0)
    for times in (1, 2):
        wait_for(lambda: kafka.count(topics.dead_letters) == times, "the dead letter", 180)  # noqa: B023
        assert counted(replay(kafka, topics))["all"] == [1, 0, 0, 0]
        newest = kafka.read(topics.input)[-1]
        first = kafka.read(topics.input)[0].timestamp
        assert dict(newest.headers) == {
            "error.reason": b"mine",
            "source.topic": b"mine",
            "event.id": f"{topics.input}-0-0".encode(),
            "replay.count": b"%d" % times,
            "event.timestamp": b"%d" % first,
        }
        assert len(newest.headers) == 5


def test_an_interrupted_replay_goes_on_where_it_was(kafka: Kafka, topics: Topics) -> None:
    kafka.create_all(topics, 4)
    kafka.send(topics.dead_letters, [dead_letter(number, topics) for number in range(20_000)])
    going = subprocess.Popen(
        command(kafka, topics), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: kafka.count(topics.input) > 500, "some to be replayed", every=0.01)
    going.send_signal(signal.SIGINT)
    stdout, stderr = going.communicate(timeout=120)
    assert going.returncode in (0, 1, 130), stderr  # 130: it came when all was done, and the process about to end
    if going.returncode == 1:
        assert "the next replay goes on there" in stdout
        assert "stopping" in stderr
    done = kafka.count(topics.input)
    assert done == 20_000 or going.returncode == 1
    assert counted(replay(kafka, topics))["all"] == [20_000 - done, 0, 0, 0]
    assert not repeated(map(trace, kafka.read(topics.input)))
    assert kafka.count(topics.input) == 20_000


def test_a_killed_replay_loses_nothing_and_repeats_at_most_what_was_under_way(kafka: Kafka, topics: Topics) -> None:
    kafka.create_all(topics, 2)
    kafka.send(topics.dead_letters, [dead_letter(number, topics) for number in range(20_000)])
    going = subprocess.Popen(command(kafka, topics), env=environment(), stdout=subprocess.DEVNULL)
    wait_for(lambda: kafka.count(topics.input) > 500, "some to be replayed", every=0.01)
    going.kill()
    going.wait()
    group = f"{topics.group}.replay"
    wait_for(lambda: not kafka.members(group), "the group to miss it", 90)
    assert replay(kafka, topics).returncode == 0
    times = Counter(map(trace, kafka.read(topics.input)))
    assert len(times) == 20_000
    assert times.total() <= 20_500


def test_two_replays_at_once_repeat_nothing(kafka: Kafka, topics: Topics) -> None:
    kafka.create_all(topics, 4)
    kafka.send(topics.dead_letters, [dead_letter(number, topics) for number in range(20_000)])
    first = subprocess.Popen(command(kafka, topics), env=environment(), stdout=subprocess.PIPE, text=True)
    wait_for(lambda: kafka.count(topics.input) > 500, "some to be replayed", every=0.01)
    second = replay(kafka, topics)
    first.communicate(timeout=120)
    assert first.returncode == 0
    assert second.returncode == 0 or "another replay is running" in second.stderr
    assert not repeated(map(trace, kafka.read(topics.input)))
    assert kafka.count(topics.input) == 20_000


def test_by_time_by_size_and_by_what_is_no_dead_letter(kafka: Kafka, topics: Topics) -> None:
    kafka.create_all(topics, 1)
    kafka.set_config(topics.input, "max.message.bytes", 2_000)
    now = int(time.time() * 1000)
    early, late = now - 3 * HOUR_MS, now - HOUR_MS
    letters = [replace(dead_letter(number, topics), timestamp=early if number < 5 else late) for number in range(10)]
    letters += [
        replace(dead_letter(10, topics, "invalid_json", ("error.value_bytes", b"9")), value=b"", timestamp=late)
    ]
    letters += [replace(dead_letter(11, topics, "result_too_large"), value=b"x" * 5_000, timestamp=late)]
    letters += [Record(b"{}", b"key", (), late)]
    kafka.send(topics.dead_letters, letters)
    since = ("--since", "2h")
    latest = replay(kafka, topics, *since)
    assert latest.returncode == 1, "something is refused"
    assert counted(latest) == {
        "(no dead letter)": [0, 0, 0, 1],
        "invalid_json": [0, 1, 0, 0],
        "missing_text": [5, 0, 0, 0],
        "result_too_large": [0, 0, 1, 0],
        "all": [5, 1, 1, 1],
    }
    assert f"the first: {topics.dead_letters}-0 at offset 12" in latest.stdout
    assert counted(replay(kafka, topics, *since))["all"] == [0, 0, 0, 1]
    assert counted(replay(kafka, topics, "--until", "2h", "--reason", "missing_text"))["all"] == [5, 0, 0, 0]
    assert counted(replay(kafka, topics))["all"] == [0, 0, 0, 1]
    assert [trace(record) for record in kafka.read(topics.input)] == [5, 6, 7, 8, 9, 0, 1, 2, 3, 4]
    assert json.loads((kafka.read(topics.input)[0]).value or b"") == {"id": 5, "text": 1}


async def commit(kafka: Kafka, group: str, place: TopicPartition, offset: OffsetAndMetadata) -> None:
    """With its metadata, to which librdkafka's clients would add a zero byte."""
    consumer = AIOKafkaConsumer(bootstrap_servers=kafka.bootstrap, group_id=group, enable_auto_commit=False)
    await consumer.start()
    try:
        consumer.assign([place])
        await consumer.commit({place: offset})
    finally:
        await consumer.stop()


def test_what_was_replayed_of_a_topic_that_is_made_anew_is_not_taken_for_what_is_in_the_new_one(
    kafka: Kafka, topics: Topics
) -> None:
    kafka.create_all(topics, 1)
    kafka.send(topics.dead_letters, [dead_letter(number, topics) for number in range(100)])
    assert counted(replay(kafka, topics))["all"] == [100, 0, 0, 0]
    group = f"{topics.group}.replay"
    old = kafka.commits(group)[0]

    kafka.delete(topics.dead_letters)
    kafka.create(topics.dead_letters)
    asyncio.run(commit(kafka, group, TopicPartition(topics.dead_letters, 0), old))  # as one that comes late
    kafka.send(topics.dead_letters, [dead_letter(number, topics) for number in range(1_000, 1_200)])
    again = replay(kafka, topics)
    assert counted(again)["all"] == [200, 0, 0, 0], again.stderr
    assert "was deleted and created again" in again.stderr
    assert counted(replay(kafka, topics))["all"] == [0, 0, 0, 0]


def test_every_reason_goes_back_once_and_what_is_no_dead_letter_is_kept_back(kafka: Kafka, topics: Topics) -> None:
    kafka.create_all(topics, 1)
    reasons = [*get_args(Reason), "unknown_schema", "invalid_utf16", "http_503"]
    letters = [dead_letter(number, topics, reason) for number, reason in enumerate(reasons)]
    strangers = [dead_letter(90, topics, "No reason"), Record(b"{}", b"key")]
    kafka.send(topics.dead_letters, [letters[0], strangers[0], *letters[1:], strangers[1]])
    dry = replay(kafka, topics, "--dry-run")
    one = replay(kafka, topics, "--reason", "invalid_utf8")
    rest = replay(kafka, topics)
    again = replay(kafka, topics)
    assert counted(dry)["all"] == [len(reasons), 0, 0, 2]
    assert counted(one) == {"(no dead letter)": [0, 0, 0, 2], "invalid_utf8": [1, 0, 0, 0], "all": [1, 0, 0, 2]}
    assert counted(rest)["all"] == [len(reasons) - 1, 0, 0, 2]
    assert counted(again) == {"(no dead letter)": [0, 0, 0, 2], "all": [0, 0, 0, 2]}
    assert {done.returncode for done in (dry, one, rest, again)} == {1}
    assert sorted(map(trace, kafka.read(topics.input))) == list(range(len(reasons)))
    assert f"the first: {topics.dead_letters}-0 at offset 1" in again.stdout
    kafka.send(topics.dead_letters, [dead_letter(91, topics)])
    assert counted(replay(kafka, topics))["missing_text"] == [1, 0, 0, 0]
    assert kafka.count(topics.input) == len(reasons) + 1


def test_more_strangers_than_can_be_remembered_are_said_before_anything_is_sent(kafka: Kafka, topics: Topics) -> None:
    kafka.create_all(topics, 1)
    kafka.send(
        topics.dead_letters,
        [Record(b"{}", b"key") if number % 2 else dead_letter(number, topics) for number in range(2_000)],
    )
    for _ in range(2):
        done = replay(kafka, topics)
        assert done.returncode == 1
        assert "cannot remember so many gaps" in done.stderr
    assert not repeated(map(trace, kafka.read(topics.input)))


def test_a_topic_of_dead_letters_that_does_not_come_ends_the_replay(kafka: Kafka, topics: Topics) -> None:
    done = replay(kafka, topics, "--request-timeout-ms", "3000")
    missing = f"dead_letter_topic: topic {topics.dead_letters} does not exist"
    assert (done.returncode, done.stderr.count(missing)) == (1, 2), done.stderr
    assert f"{missing}; create it, or name another; waited 6 s for it" in done.stderr
    assert "Traceback" not in done.stderr
