"""Long texts in windows on a real Kafka: their results, a rebalance during a backlog of them, and a drain."""

from collections import Counter
from pathlib import Path

import orjson
import pytest

from tests.support.checkpoint import Oracle
from tests.support.process import WorkerProcess, Workers
from tests.support.scenario import result_place, wait_until_committed
from tests.support.topics import Kafka, Record, Topics
from tests.support.waiting import wait_for
from worker.model.sentiment_model import SentimentModel

pytestmark = pytest.mark.kafka

WINDOWS: dict[str, object] = {"long_text": "windows", "cache_size": 0, "cpu_threads": 1}
SLOW = {"TOKEN_SECONDS": "0.0002"}  # a text of eight windows takes 0.8 s, and 64 of them would take 52 s
MEGABYTE = 1_000_000


@pytest.fixture
def worker_module() -> str:
    return "tests.support.slow_model"


def long_text(number: int, words: int) -> str:
    return f"отзыв {number} " + "очень другой день " * (words // 3)  # of a token each


def event(number: int, words: int) -> Record:
    return Record(orjson.dumps({"id": number, "text": long_text(number, words)}), b"key %d" % number)


def fields_of(record: Record) -> dict[str, object]:
    found: dict[str, object] = orjson.loads(record.value or b"")
    return found


@pytest.mark.parametrize("delivery", ["at-least-once", "exactly-once"])
def test_a_worker_that_joins_during_a_backlog_of_long_texts_repeats_and_loses_nothing(
    kafka: Kafka, topics: Topics, workers: Workers, checkpoint: Path, delivery: str, tmp_path: Path
) -> None:
    """A micro-batch closes by tokens, so that the one in the model ends before the deadline of the revocation."""
    kafka.create_all(topics, 4)
    sent = kafka.send(topics.input, [event(number, 600 + 150 * (number % 32)) for number in range(128)])
    settings = {"delivery": delivery, "model": checkpoint, **WINDOWS}
    slow = {**SLOW, "FAST_FILE": str(tmp_path / "fast")}
    first = workers.start(topics, slow, **settings).wait_until_assigned(4)
    wait_for(lambda: first.metrics.get("results_published_total") >= 10, "results of the first one")
    second = workers.start(topics, slow, **settings).wait_until_assigned(2)
    first.wait_until_assigned(2)
    assert sum(kafka.committed(topics.group, topics.input).values()) < 0.75 * len(sent), "a backlog was left"
    wait_for(lambda: second.metrics.get("results_published_total") > 0, "results of the second one")
    third = workers.start(topics, slow, **settings)
    assert first.terminate() == 0, "it drains in the middle of the backlog, within drain_timeout_s"
    (tmp_path / "fast").touch()
    wait_until_committed(kafka, topics)
    third.wait_until_ready()
    for worker in (second, third):
        assert worker.metrics.get("duplicates_possible_total") == 0
        assert worker.terminate() == 0
    assert_rebalances_were_in_time(first, second, third)
    results = kafka.read(topics.output)
    assert Counter(map(result_place, results)) == Counter(record.place for record in sent)
    counts = {int(str(fields["id"])): fields["windows"] for fields in map(fields_of, results)}
    assert set(counts.values()) == set(range(2, 9))
    assert [counts[number] for number in (0, 31)] == [2, 8]


def assert_rebalances_were_in_time(*workers: WorkerProcess) -> None:
    for worker in workers:
        assert worker.warnings("revoked before everything under way was published") == []
        assert worker.lines("Traceback") == []


def test_results_say_how_many_windows_they_are_of(
    kafka: Kafka, topics: Topics, workers: Workers, checkpoint: Path, oracle: Oracle
) -> None:
    """And a megabyte of text goes through beside the others, of which a prefix is scored."""
    for name in (topics.input, topics.output, topics.dead_letters):
        kafka.create(name, 1, max_message_bytes=4_000_000)
    texts = [long_text(0, 30), long_text(1, 1_200), long_text(2, 6_000), (long_text(3, 3) * 30_000)[:MEGABYTE]]
    value = [orjson.dumps({"id": number, "text": text}) for number, text in enumerate(texts)]
    kafka.send(topics.input, [Record(each, b"key") for each in value])
    worker = workers.start(topics, module="worker", model=checkpoint, max_text_chars=MEGABYTE, max_windows=5, **WINDOWS)
    wait_until_committed(kafka, topics)
    metrics = worker.metrics
    assert worker.terminate() == 0
    results = [fields_of(record) for record in kafka.read(topics.output)]
    assert [(each["windows"], each["truncated"]) for each in results] == [(1, False), (3, False), (5, True), (5, True)]
    assert str(results[0]["model"]).endswith("+long_text=windows+max_windows=5")
    assert list(results[0])[4:6] == ["truncated", "windows"]
    model = SentimentModel.load(str(checkpoint), long_text="windows", max_windows=5, cpu_threads=1)
    for result, scored in zip(results, model.score(texts), strict=True):
        assert scored.sentiment is not None
        found = result["probabilities"]
        assert isinstance(found, dict)
        assert list(found.values()) == pytest.approx(scored.sentiment.probabilities, abs=2e-5)
    assert list(results[0]["probabilities"].values()) == pytest.approx(  # type: ignore[attr-defined]
        oracle.probabilities(texts[0]).tolist(), abs=2e-5
    )
    assert metrics.get("texts_truncated_total") == 2
    tokens, unknown = model.count_tokens(model.tokenize(texts).ids)
    assert (metrics.get("tokens_total"), metrics.get("unknown_tokens_total")) == (tokens, unknown)
