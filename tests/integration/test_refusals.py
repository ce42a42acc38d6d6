"""What the broker refuses to take, for its timestamp or its size, and what it must not refuse."""

import time

import orjson
import pytest

from tests.support.process import COSTLESS, LONG_SESSION, Metrics, Workers
from tests.support.scenario import (
    TOMBSTONE,
    Case,
    Story,
    TopicSizes,
    letter_place,
    make_topics,
    places,
    play,
    result_place,
    wait_until_committed,
)
from tests.support.topics import Kafka, Record

pytestmark = pytest.mark.kafka


@pytest.fixture
def worker_module() -> str:
    return COSTLESS


ANY_TIME = {"message_timestamp_after_max_ms": 2**62}
LARGE = {"max_message_bytes": 3_000_000}
TEN_HOURS = 36_000_000


def small(number: int) -> Case:
    return Case(Record(orjson.dumps({"id": number, "text": f"хорошо {number}"}), b"key %d" % (number % 7)))


def error_headers(record: Record) -> dict[str, bytes | None]:
    return {name: value for name, value in record.headers if name.startswith(("error.", "source."))}


def assert_small_ones_came_out(story: Story) -> None:
    for name in story.expected("result"):
        story.result(name)
    assert len(story.output) == len(story.expected("result")) + len(story.expected(TOMBSTONE))
    assert story.metrics.counts_by("reason", "dead_letters_total") == story.reasons
    assert story.metrics.outcomes == len(story.cases)
    assert story.exit_code == 0


def test_a_timestamp_that_the_broker_refuses_makes_a_dead_letter(kafka: Kafka, workers: Workers) -> None:
    ahead = int(time.time() * 1000) + TEN_HOURS
    cases = {
        **{f"before {number}": small(number) for number in range(100)},
        "ahead": Case(
            Record(orjson.dumps({"text": "завтра"}), b"key 1", (("trace", b"1"),), ahead), "invalid_timestamp"
        ),
        **{f"between {number}": small(number) for number in range(100)},
        "ahead again": Case(Record(orjson.dumps({"text": "завтра"}), b"key 2", (), ahead + 5), "invalid_timestamp"),
        "year 10000": Case(Record(orjson.dumps({"text": "когда-то"}), b"key 3", (), 10**15), "invalid_timestamp"),
        "tombstone ahead": Case(Record(None, b"key 4", (), ahead), "invalid_timestamp"),
        "bad and ahead": Case(Record(b"{", b"key 5", (), ahead), "invalid_json"),
        **{f"after {number}": small(number) for number in range(100)},
    }
    story = play(kafka, workers, cases, settings={}, sizes=TopicSizes(input=ANY_TIME))
    assert_small_ones_came_out(story)
    for name in story.expected("invalid_timestamp"):
        sent, letter = story.sent[name], story.dead_letter(name)
        assert (letter.key, letter.value) == (sent.key, sent.value), name
        assert tuple(letter.headers[: len(sent.headers)]) == tuple(sent.headers), name
        headers = error_headers(letter)
        assert headers["error.stage"] == b"publish", name
        assert headers["source.timestamp"] == str(sent.timestamp).encode(), name
        assert abs(letter.timestamp / 1000 - time.time()) < 600, name


def test_a_result_that_its_topic_refuses_for_its_size_is_a_dead_letter(kafka: Kafka, workers: Workers) -> None:
    """Topics that take little: one result that is too large costs itself, and many small ones are not too large
    together."""
    sizes = TopicSizes((1, 1, 1), output={"max_message_bytes": 20_000}, dead_letters={"max_message_bytes": 60_000})
    cases = {
        **{f"small {number}": small(number) for number in range(500)},
        "large key": Case(Record(orjson.dumps({"text": "ключ"}), b"k" * 25_000), "result_too_large"),
        "large header": Case(
            Record(orjson.dumps({"text": "заголовок"}), b"key 1", (("h", b"h" * 30_000),)), "result_too_large"
        ),
        "large tombstone": Case(Record(None, b"t" * 25_000), "result_too_large"),
        "large and bad": Case(Record(b"{" * 80_000, b"key 2", (("trace", b"1"),)), "invalid_json"),
        "large, bad, headers": Case(Record(b"{" * 80_000, b"key 2", (("h", b"h" * 70_000),)), "invalid_json"),
        **{f"medium {number}": Case(Record(b"{" * 30_000, b"key"), "invalid_json") for number in range(5)},
        **{f"after {number}": small(number) for number in range(500)},
    }
    story = play(kafka, workers, cases, settings={"compression_type": "none"}, sizes=sizes)
    assert_small_ones_came_out(story)
    for name in story.expected("result_too_large"):
        sent, letter = story.sent[name], story.dead_letter(name)
        assert (letter.key, letter.value) == (sent.key, sent.value), name
        assert error_headers(letter)["error.stage"] == b"publish", name
    refused = story.dead_letter("large and bad")
    assert refused.value == b"", "a null would be a tombstone"
    assert refused.headers[0] == ("trace", b"1")
    assert error_headers(refused)["error.value_bytes"] == b"80000"
    assert story.dead_letter("large, bad, headers").value == b""
    for number in range(5):
        assert story.dead_letter(f"medium {number}").value == b"{" * 30_000
        assert "error.value_bytes" not in error_headers(story.dead_letter(f"medium {number}"))


def test_records_larger_than_a_fetch_are_read(kafka: Kafka, workers: Workers) -> None:
    """Larger than the consumer's default fetch of a partition (1 MiB): read all the same, neighbours too."""
    pad = "x" * 2_500_000
    cases = {
        "before": small(1),
        "large": Case(Record(orjson.dumps({"id": "large", "text": "хорошо", "pad": pad}), b"key")),
        "between": small(2),
        "too large": Case(Record(orjson.dumps({"text": pad}), b"key"), "too_large"),
        "after": small(3),
    }
    story = play(kafka, workers, cases, settings={}, sizes=TopicSizes((1, 1, 1), input=LARGE))
    assert_small_ones_came_out(story)
    letter = story.dead_letter("too large")
    assert letter.value == b"", "the dead-letter topic takes no more than 1 MiB"
    value = story.sent["too large"].value or b""
    assert error_headers(letter)["error.value_bytes"] == str(len(value)).encode()


def test_enriched_records_meet_the_limit_of_their_topic(kafka: Kafka, workers: Workers) -> None:
    """What a topic of 3 MB takes is published; what grows past the limit is not."""
    fits = {"id": "fits", "text": "хорошо", "pad": "x" * 2_500_000}
    grows = {"id": "grows", "text": "хорошо", "pad": "x" * 2_999_700}
    cases = {
        "fits": Case(Record(orjson.dumps(fits), b"key")),
        "grows": Case(Record(orjson.dumps(grows), b"key"), "result_too_large"),
        "after": small(1),
    }
    sizes = TopicSizes((1, 1, 1), input=LARGE, output=LARGE, dead_letters={"max_message_bytes": 4_000_000})
    story = play(kafka, workers, cases, settings={"output_mode": "enrich"}, sizes=sizes)
    assert_small_ones_came_out(story)
    assert story.dead_letter("grows").value == story.sent["grows"].value


def test_topic_limits_that_are_lowered_while_it_runs_hold(kafka: Kafka, workers: Workers) -> None:
    """The worker cannot know: the broker refuses whole batches, of which only what is too large or too early is dead."""
    sent, output, dead_letters, metrics = play_with_lowered_limits(kafka, workers)
    expected = {record.place for record in sent if record.key != b"bad"}
    assert places(output) == dict.fromkeys(expected, 1)
    reasons = {letter_place(letter)[2]: error_headers(letter)["error.reason"] for letter in dead_letters}
    assert reasons == {60: b"result_too_large", 140: b"invalid_timestamp"}
    assert metrics.outcomes == len(sent)


def test_order_is_kept_around_what_is_refused(kafka: Kafka, workers: Workers) -> None:
    _, output, _, _ = play_with_lowered_limits(kafka, workers)
    offsets = [place[2] for record in output if (place := result_place(record))]
    assert offsets == sorted(offsets)


def play_with_lowered_limits(
    kafka: Kafka, workers: Workers
) -> tuple[list[Record], list[Record], list[Record], Metrics]:
    """200 records, of which 60 and 140 are refused: what was sent, the results, the dead letters, the metrics."""
    topics = make_topics(kafka, TopicSizes((1, 1, 1)))
    worker = workers.start(topics, **LONG_SESSION).wait_until_assigned(1)
    kafka.set_config(topics.output, "max.message.bytes", 20_000)
    kafka.set_config(topics.output, "message.timestamp.after.max.ms", 60_000)
    records = [small(number).record for number in range(200)]
    records[60] = Record(orjson.dumps({"text": "большой"}), b"bad", (("h", b"h" * 25_000),))
    records[140] = Record(orjson.dumps({"text": "завтра"}), b"bad", (), int(time.time() * 1000) + 600_000)
    sent = kafka.send(topics.input, records)
    wait_until_committed(kafka, topics)
    metrics = worker.metrics
    assert worker.terminate() == 0
    return sent, kafka.read(topics.output), kafka.read(topics.dead_letters), metrics
