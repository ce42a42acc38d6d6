"""Several input topics, and topics by a pattern: also those that come later, without loss and without a repeat."""

from pathlib import Path

import orjson
import pytest

from tests.support.process import COSTLESS, LONG_SESSION, Workers, forked
from tests.support.scenario import letter_place, places, result_place, worked
from tests.support.topics import Kafka, Record, Topics, numbered
from tests.support.waiting import wait_for

pytestmark = pytest.mark.kafka
NO_CACHE = {"cache_size": 0}
OFTEN = {"INTERVALS": '{"TOPICS_INTERVAL_S": 2}'}  # a pattern is compared with the cluster's topics


@pytest.fixture
def worker_module() -> str:
    return COSTLESS


def create_outputs(kafka: Kafka, topics: Topics) -> None:
    kafka.create(topics.output, 2)
    kafka.create(topics.dead_letters)


def test_two_topics_with_their_texts_in_different_fields(kafka: Kafka, topics: Topics, workers: Workers) -> None:
    reviews, posts = f"{topics.input}.reviews", f"{topics.input}.posts"
    create_outputs(kafka, topics)
    for name in (reviews, posts):
        kafka.create(name, 2)
    body, inside = orjson.dumps({"body": "хорошо"}), orjson.dumps({"data": {"text": "плохо"}})
    sent = kafka.send(reviews, [Record(body), Record(inside)]) + kafka.send(posts, [Record(inside), Record(body)])
    worker = workers.start(
        topics, input_topics=f"{reviews},{posts}", text_field=f"{reviews}=body, data.text", dead_letter_limit=0
    ).wait_until_assigned(4)
    wait_for(lambda: worker.metrics.outcomes == 4, "four outcomes")
    assert worker.metrics.by("topic", "records_consumed_total") == {reviews: 2, posts: 2}
    assert worker.terminate() == 0
    assert {result_place(record) for record in kafka.read(topics.output)} == {sent[0].place, sent[2].place}
    letters = {letter_place(record): dict(record.headers) for record in kafka.read(topics.dead_letters)}
    assert letters.keys() == {sent[1].place, sent[3].place}
    assert letters[sent[1].place]["error.message"] == b"the object has no field body"
    assert letters[sent[3].place]["error.message"] == b"the object has no field data.text"


@pytest.mark.parametrize("delivery", ["at-least-once", "exactly-once"])
def test_a_topic_that_comes_later_is_read_and_nothing_is_repeated(
    kafka: Kafka, topics: Topics, workers: Workers, delivery: str, tmp_path: Path
) -> None:
    """Two workers, busy all the time: each takes the new topic up by itself, which rebalances the group."""
    slow = {**OFTEN, "PASS_SECONDS": "0.5", "FAST_FILE": str(tmp_path / "fast")}
    names = [f"{topics.input}.{number}" for number in range(3)]
    create_outputs(kafka, topics)
    kafka.create(names[0], 4)
    kafka.create(f"another.{names[0]}")
    pattern = rf"{topics.input}\.\d"
    settings = {"input_topics": None, "input_pattern": pattern, "delivery": delivery, "max_batch_texts": 64}
    pair = [workers.start(topics, slow, **settings, **NO_CACHE, **LONG_SESSION) for _ in range(2)]
    for worker in pair:
        worker.wait_until_assigned(2)
    sent = kafka.send(names[0], map(numbered, range(24_000)))
    kafka.send(f"another.{names[0]}", [numbered(0)])
    for name in names[1:]:
        kafka.create(name, 2)
        sent += kafka.send(name, map(numbered, range(1_000)))
    for worker in pair:
        worker.wait_until_assigned(4)
    before = kafka.count(topics.output)
    assert before < 24_000, "all was done before the new topics were taken up: this has shown nothing"
    (tmp_path / "fast").touch()
    wait_for(lambda: sum(worker.metrics.outcomes for worker in pair) >= len(sent), "every record", 120)
    wait_for(
        lambda: {name for worker in pair for name in worker.metrics.by("topic", "consumer_lag_records")} == set(names),
        "a lag of every topic",
    )
    assert all(worker.terminate() == 0 for worker in pair)
    found = places(kafka.read(topics.output))
    assert set(found) == {record.place for record in sent}
    assert set(found.values()) == {1}, "some came out twice"
    for name in names:
        assert worked(kafka.committed(topics.group, name)) == worked(kafka.ends(name))


def test_a_pattern_that_nothing_matches_yet_is_waited_for(kafka: Kafka, topics: Topics, workers: Workers) -> None:
    create_outputs(kafka, topics)
    pattern = rf"{topics.input}(\.more)?"
    kafka.create(f"{topics.input}.more.than.that")
    worker = workers.start(topics, input_topics=None, input_pattern=pattern).wait_for_status("/livez", 200)
    wait_for(lambda: worker.warnings("no topic has a name that matches"), "a line about the pattern")
    assert worker.status("/readyz") == 503
    kafka.create(topics.input)
    kafka.send(topics.input, map(numbered, range(10)))
    worker.wait_until_ready()
    wait_for(lambda: kafka.count(topics.output) == 10, "the results")
    assert len(worker.warnings("no topic has a name that matches")) == 1, "said once"
    assert worker.terminate() == 0


def test_a_topic_of_a_pattern_that_is_deleted_leaves_the_others_at_work(
    kafka: Kafka, topics: Topics, workers: Workers
) -> None:
    create_outputs(kafka, topics)
    stays, goes = f"{topics.input}.2", f"{topics.input}.1"
    for name in (stays, goes):
        kafka.create(name)
    worker = workers.start(topics, input_topics=None, input_pattern=rf"{topics.input}\.\d", **NO_CACHE)
    worker.wait_until_assigned(2)
    kafka.send(goes, map(numbered, range(10)))
    wait_for(lambda: kafka.count(topics.output) == 10, "the results")
    kafka.delete(goes)
    kafka.send(stays, map(numbered, range(10)))
    wait_for(lambda: kafka.count(topics.output) == 20, "the results of the other")
    comes = f"{topics.input}.3"
    kafka.create(comes)
    kafka.send(comes, map(numbered, range(10)))
    wait_for(lambda: kafka.count(topics.output) == 30, "the results of a third", 90)
    worker.wait_until_assigned(2)
    assert worker.terminate() == 0


def test_check_looks_at_every_topic_of_a_pattern(kafka: Kafka, topics: Topics) -> None:
    create_outputs(kafka, topics)
    flags = [
        "--bootstrap-servers", kafka.bootstrap, "--model", "builtin", "--http-port", 0, "--group-id", topics.group,
        "--output-topic", topics.output, "--dead-letter-topic", topics.dead_letters,
        "--input-pattern", rf"{topics.input}\.\d",
    ]  # fmt: skip
    done = forked("check", *flags)
    assert done.returncode == 1
    assert "no topic has a name that matches" in done.stdout
    for number in range(2):
        kafka.create(f"{topics.input}.{number}", 3)
    done = forked("check", *flags)
    assert done.returncode == 0, done.stdout
    assert all(f"READ on topic {topics.input}.{number}" in done.stdout for number in range(2))
    assert "work for up to 6" in done.stdout
