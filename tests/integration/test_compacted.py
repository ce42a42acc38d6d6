"""Topics with cleanup.policy=compact, which take no record without a key."""

import pytest

from tests.integration.test_check import flags, lines_of
from tests.support.process import COSTLESS, Workers, forked
from tests.support.scenario import letter_place, result_place, wait_until_committed
from tests.support.topics import Kafka, Record, Topics, numbered
from tests.support.waiting import wait_for

pytestmark = pytest.mark.kafka
BOTH = pytest.mark.parametrize("delivery", ["at-least-once", "exactly-once"])


@pytest.fixture
def worker_module() -> str:
    return COSTLESS


def some_without_a_key(number: int) -> Record:
    record = numbered(number)
    return record if number % 10 else Record(record.value)


@BOTH
@pytest.mark.parametrize(("policy", "is_known"), [("compact", True), ("compact,delete", True), ("compact", False)])
def test_what_has_no_key_is_a_dead_letter_and_its_neighbours_are_published(
    kafka: Kafka, topics: Topics, workers: Workers, delivery: str, policy: str, is_known: bool
) -> None:
    """Also where the topic becomes compacted under the worker's hands, which the broker's refusal tells then."""
    kafka.create(topics.input)
    kafka.create(topics.output, 1, **({"cleanup_policy": policy} if is_known else {}))
    kafka.create(topics.dead_letters)
    worker = workers.start(topics, delivery=delivery).wait_until_assigned(1)
    if not is_known:
        kafka.set_config(topics.output, "cleanup.policy", policy)
    sent = kafka.send(topics.input, map(some_without_a_key, range(500)))
    wait_until_committed(kafka, topics)
    wait_for(lambda: worker.metrics.outcomes == len(sent), "every record to be counted")
    metrics = worker.metrics
    assert metrics.get("dead_letters_total", stage="publish", reason="key_required") == 50
    assert metrics.get("dead_letters_total") == 50
    assert len(worker.warnings("results are refused")) == 1
    worker.wait_until_ready()
    assert worker.terminate() == 0
    letters = kafka.read(topics.dead_letters)
    assert sorted(map(letter_place, letters)) == [record.place for record in sent[::10]]
    assert {dict(letter.headers)["error.reason"] for letter in letters} == {b"key_required"}
    results = [place for record in kafka.read(topics.output) if (place := result_place(record))]
    assert results == [record.place for record in sent if record.key is not None], "in order"


def test_a_dead_letter_topic_that_is_compacted_is_refused(kafka: Kafka, topics: Topics, workers: Workers) -> None:
    kafka.create(topics.input)
    kafka.create(topics.output, 1, cleanup_policy="compact")
    kafka.create(topics.dead_letters, 1, cleanup_policy="compact,delete")
    worker = workers.start(topics)
    assert worker.wait() == 2
    (sentence,) = worker.warnings()
    assert f"dead_letter_topic: topic {topics.dead_letters} is compacted" in sentence
    assert "Traceback" not in worker.output

    asked = [*flags(kafka, topics), "--model", "/nowhere/at/all"]  # topics are looked at all the same
    done = forked("check", *asked)
    assert lines_of(done.stdout)["compaction"] == "fail"
    assert f"{topics.output} is compacted: results without a key become dead letters" in done.stdout
    kafka.set_config(topics.dead_letters, "cleanup.policy", "delete")
    done = forked("check", *asked)
    assert lines_of(done.stdout)["compaction"] == "warn"
