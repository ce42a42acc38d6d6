"""Records in and out on a real Kafka: one worker for each of the three combinations of input format and output mode."""

import hashlib
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from tests.support.broker import Broker
from tests.support.checkpoint import POISON, Oracle
from tests.support.process import Workers, workers_in
from tests.support.scenario import SKIPPED, TOMBSTONE, Case, Story, TopicSizes, play
from tests.support.topics import CODECS, Kafka, Record, codecs_of

pytestmark = pytest.mark.kafka

SECRET = "заветное"  # in every text: must never be printed
THEN = 1_700_000_000_123
STRANGE_HEADERS = (("trace", b"\x00\xff"), ("trace", b"again"), ("nothing", None), ("content-type", b"text/plain"))
LONG = f"{SECRET} слово " * 600
AT_THE_LIMIT = (f"{SECRET} слова " * 8_000)[:100_000]


def event(text: object = f"{SECRET}: хорошо", /, **fields: object) -> bytes:
    return orjson.dumps({"text": text, **fields})


JSON_CASES = {
    "all of it": Case(Record(event(f"{SECRET}, какая гадость", id="42"), b"key", STRANGE_HEADERS, THEN)),
    "no key": Case(Record(event(id="no key"), None, partition=3)),
    "empty key": Case(Record(event(id="empty key"), b"")),
    "id is text": Case(Record(event(id="событие «1»"), b"a")),
    "id is an integer": Case(Record(event(id=-17), b"a")),
    "id is a large integer": Case(Record(b'{"id": 123456789012345678901234567890, "text": "\\u0430"}', b"a")),
    "id is from the header": Case(Record(event(), b"a", (("event.id", "из заголовка".encode()),))),
    "id goes before the header": Case(Record(event(id="field"), b"a", (("event.id", b"header"),))),
    "id is no id, header": Case(Record(event(id=1.5), b"a", (("event.id", b"header"),))),
    "id is no id": Case(Record(event(id=True), b"a")),
    "id is null": Case(Record(event(id=None), b"a")),
    "id is missing": Case(Record(event(), b"a")),
    "long": Case(Record(event(LONG), b"long")),
    "at the limit": Case(Record(event(AT_THE_LIMIT), b"long")),
    "half a JSON": Case(Record(f'{{"text": "{SECRET}"'.encode(), b"bad", STRANGE_HEADERS, THEN), "invalid_json"),
    "nothing at all": Case(Record(b"", b"bad"), "invalid_json"),
    "another encoding": Case(Record(f'{{"text": "{SECRET}"}}'.encode("cp1251"), b"bad"), "invalid_utf8"),
    "a list": Case(Record(b'["text"]', b"bad"), "not_an_object"),
    "no text": Case(Record(orjson.dumps({"id": 1, "body": SECRET}), b"bad"), "missing_text"),
    "text is a number": Case(Record(event(5), b"bad"), "text_not_string"),
    "text is null": Case(Record(event(None), b"bad"), "text_not_string"),
    "white space": Case(Record(event(" \t\n\u00a0\u2003"), b"bad"), "empty_text"),
    "too long": Case(Record(event(AT_THE_LIMIT + "я"), b"bad"), "too_large"),
    "poison": Case(Record(event(f"{SECRET} {POISON} {SECRET}"), b"bad", STRANGE_HEADERS), "inference_failed"),
    "no key, dead": Case(Record(event(5), None), "text_not_string"),
    "tombstone": Case(Record(None, b"gone", STRANGE_HEADERS, THEN), TOMBSTONE),
    "null": Case(Record(None, None), SKIPPED),
    **{
        f"codec {codec}, {number}": Case(Record(event(f"{SECRET} {codec} {number}"), b"packed"), codec=codec)
        for codec in CODECS
        for number in range(20)
    },
    **{
        f"ordered {number}": Case(Record(event(f"{SECRET} {number % 40}", id=number), b"key %d" % (number % 20)))
        for number in range(600)
    },
}

OWN = (
    '\n {"meta":{"id":12345678901234567890123,"id2" : 1.50},  "payload": {"text":"'
    + SECRET
    + '\\u0021 } {"}, "z":[]}\t\n '
)
ENRICH_CASES = {
    "odd bytes": Case(Record(OWN.encode(), b"key", STRANGE_HEADERS, THEN)),
    "twice": Case(Record(f'{{"payload":{{"text":"{SECRET}"}},"a":1,"a":2.0}}'.encode(), b"key")),
    "inner field": Case(Record(orjson.dumps({"payload": {"text": SECRET, "sentiment": 1}}), b"key")),
    "field exists": Case(
        Record(orjson.dumps({"payload": {"text": SECRET}, "sentiment": None}), b"key"), "field_exists"
    ),
    "escaped": Case(Record(b'{"payload": {"text": "a"}, "sentimen\\u0074": 1}', b"key"), "field_exists"),
    "no way inside": Case(Record(orjson.dumps({"payload": SECRET}), b"key"), "missing_text"),
    "a dotted name": Case(Record(orjson.dumps({"payload.text": SECRET}), b"key"), "missing_text"),
    "tombstone": Case(Record(None, b"gone", STRANGE_HEADERS), TOMBSTONE),
    "null": Case(Record(None, None), SKIPPED),
}

TEXT_CASES = {
    "text": Case(Record(f"{SECRET}, всё хорошо".encode(), b"key", STRANGE_HEADERS, THEN)),
    "looks like JSON": Case(Record(event(id="not read"), b"key")),
    "header id": Case(Record(SECRET.encode(), b"key", (("event.id", b"from header"),))),
    "no key": Case(Record(SECRET.encode(), None, partition=2)),
    "white space": Case(Record(b" \n", b"key"), "empty_text"),
    "nothing": Case(Record(b"", b"key"), "empty_text"),
    "another encoding": Case(Record(SECRET.encode("cp1251"), b"key", STRANGE_HEADERS), "invalid_utf8"),
    "too long": Case(Record((AT_THE_LIMIT + "я").encode(), b"key"), "too_large"),
    "tombstone": Case(Record(None, b"gone"), TOMBSTONE),
    "null": Case(Record(None, None), SKIPPED),
}

STORIES: dict[str, tuple[dict[str, Case], dict[str, object]]] = {
    "json": (JSON_CASES, {"compression_type": "zstd"}),
    "enrich": (
        ENRICH_CASES,
        {
            "output_mode": "enrich",
            "text_field": "payload.text",
            "id_field": "meta.id",
            "compression_type": "lz4",
        },
    ),
    "text": (TEXT_CASES, {"input_format": "text", "compression_type": "snappy"}),
}


@pytest.fixture(scope="module")
def module_workers(broker: Broker, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    with workers_in(broker.bootstrap, checkpoint, tmp_path_factory.mktemp("workers"), is_forked=True) as workers:
        yield workers


def played(broker: Broker, workers: Workers, name: str) -> Story:
    cases, settings = STORIES[name]
    return play(Kafka(broker.bootstrap), workers, cases, settings=settings, sizes=TopicSizes())


@pytest.fixture(scope="module")
def json_story(broker: Broker, module_workers: Workers) -> Story:
    return played(broker, module_workers, "json")


@pytest.fixture(scope="module")
def enrich_story(broker: Broker, module_workers: Workers) -> Story:
    return played(broker, module_workers, "enrich")


@pytest.fixture(scope="module")
def text_story(broker: Broker, module_workers: Workers) -> Story:
    return played(broker, module_workers, "text")


@pytest.fixture(scope="module", params=STORIES)
def story(request: pytest.FixtureRequest) -> Story:
    found: Story = request.getfixturevalue(f"{request.param}_story")
    return found


def fields(record: Record) -> dict[str, Any]:
    found: dict[str, Any] = orjson.loads(record.value or b"")
    return found.get("sentiment", found)


def iso(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


# Every story


def test_every_record_comes_out_once_and_where_it_should(story: Story) -> None:
    for name in story.expected("result"):
        story.result(name)
    for reason in story.reasons:
        for name in story.expected(reason):
            assert dict(story.dead_letter(name).headers)["error.reason"] == reason.encode(), name
    assert len(story.output) == len(story.expected("result")) + len(story.expected(TOMBSTONE))
    assert len(story.dead_letters) == story.reasons.total()


def test_the_group_ends_at_the_end(story: Story) -> None:
    assert story.exit_code == 0
    assert story.committed == story.ends


def test_metrics_add_up(story: Story) -> None:
    metrics = story.metrics
    assert metrics.get("records_consumed_total", topic=story.topics.input) == len(story.cases) == metrics.outcomes
    assert metrics.get("results_published_total") == len(story.expected("result")) == metrics.get("score_count")
    assert metrics.counts_by("reason", "dead_letters_total") == story.reasons
    assert metrics.get("tombstones_total") == len(story.expected(TOMBSTONE))
    assert metrics.get("records_skipped_total") == len(story.expected(SKIPPED))
    implausible = metrics.get("implausible_timestamps_total")
    assert metrics.get("end_to_end_seconds_count") == len(story.expected("result")) - implausible
    assert implausible < 3
    assert metrics.get("duplicates_possible_total") == 0
    assert metrics.get("assigned_partitions") == 4
    assert metrics.get("ready") == 1


def test_metrics_count_labels(story: Story) -> None:
    labels = [fields(story.result(name))["label"] for name in story.expected("result")]
    assert story.metrics.counts_by("label", "results_published_total") == Counter(labels)


def test_no_text_is_printed_or_exposed(story: Story) -> None:
    assert SECRET not in story.printed
    assert SECRET.encode("cp1251").hex() not in story.printed
    assert not [labels for _, labels, _ in story.metrics.samples if SECRET in str(labels)]
    for letter in story.dead_letters:
        assert SECRET not in (dict(letter.headers)["error.message"] or b"").decode()


def test_results_keep_key_headers_and_timestamp(story: Story) -> None:
    for name in story.expected("result"):
        sent, result = story.sent[name], story.result(name)
        assert (result.key, result.timestamp) == (sent.key, sent.timestamp), name
        kept = [header for header in sent.headers if header[0] != "content-type"]
        assert sorted(result.headers, key=str) == sorted([*kept, ("content-type", b"application/json")], key=str), name
        assert [header for header in result.headers if header[0] == "trace"] == [
            header for header in kept if header[0] == "trace"
        ]


def test_dead_letters_keep_everything_and_say_why(story: Story) -> None:
    for reason in story.reasons:
        for name in story.expected(reason):
            sent, letter = story.sent[name], story.dead_letter(name)
            assert (letter.key, letter.value) == (sent.key, sent.value), name
            assert tuple(letter.headers[: len(sent.headers)]) == tuple(sent.headers), name
            added = dict(letter.headers[len(sent.headers) :])
            assert added.pop("error.message"), name
            assert added == {
                "error.stage": b"infer" if reason == "inference_failed" else b"decode",
                "error.reason": reason.encode(),
                "source.topic": sent.topic.encode(),
                "source.partition": str(sent.partition).encode(),
                "source.offset": str(sent.offset).encode(),
                "source.timestamp": str(sent.timestamp).encode(),
                "worker.version": version("sentiment-worker").encode(),
            }, name
            assert abs(letter.timestamp / 1000 - time.time()) < 600, "a dead letter's timestamp is now"


def test_tombstones_go_on_as_they_are(story: Story) -> None:
    names = story.expected(TOMBSTONE)
    forwarded = [record for record in story.output if record.value is None]
    assert len(forwarded) == len(names) == 1
    sent = story.sent[names[0]]
    assert (forwarded[0].key, forwarded[0].timestamp) == (sent.key, sent.timestamp)
    assert set(sent.headers) - {("content-type", b"text/plain")} <= set(forwarded[0].headers)


def test_partitions_are_the_default_partitioners(story: Story, broker: Broker) -> None:
    kafka = Kafka(broker.bootstrap)
    probe = f"{story.topics.output}.probe"
    kafka.create(probe, 3)
    keyed = [record for record in story.output if record.key is not None]
    expected = kafka.send(probe, [Record(b"", record.key) for record in keyed])
    assert [record.partition for record in keyed] == [record.partition for record in expected]
    keyless = [record for record in story.output if record.key is None]
    assert [record.partition for record in keyless] == [fields(record)["source"]["partition"] % 3 for record in keyless]


def test_what_is_published_is_compressed(story: Story, broker: Broker) -> None:
    published = {(record.topic, record.partition) for record in [*story.output, *story.dead_letters]}
    codecs = [codecs_of(broker.read_segment(topic, partition)) for topic, partition in published]
    assert set.union(*codecs) == {story.settings["compression_type"]}


# Results


def test_a_result_in_full(json_story: Story, checkpoint: Path, oracle: Oracle) -> None:
    result = fields(json_story.result("all of it"))
    sent = json_story.sent["all of it"]
    assert list(result) == [
        "id",
        "label",
        "score",
        "probabilities",
        "truncated",
        "model",
        "source",
        "event_time",
        "processed_at",
    ]
    sums = "".join(
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in sorted(checkpoint.iterdir())
    )
    assert result["model"] == f"{checkpoint}@{hashlib.sha256(sums.encode()).hexdigest()[:12]}"
    assert result["id"] == "42"
    assert result["truncated"] is False
    assert result["source"] == {"topic": sent.topic, "partition": sent.partition, "offset": sent.offset}
    assert result["event_time"] == "2023-11-14T22:13:20.123Z"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", result["processed_at"])
    assert abs(datetime.fromisoformat(result["processed_at"]).timestamp() - time.time()) < 600
    assert result["label"] == oracle.label(oracle.probabilities(f"{SECRET}, какая гадость"))


def test_results_say_what_the_model_says(json_story: Story, oracle: Oracle) -> None:
    labels = set()
    for name in json_story.expected("result"):
        result = fields(json_story.result(name))
        text = orjson.loads(json_story.sent[name].value or b"")["text"]
        expected = oracle.probabilities(text)
        found = list(result["probabilities"].values())
        assert list(result["probabilities"]) == ["negative", "neutral", "positive"]
        np.testing.assert_allclose(found, expected, atol=2e-5, err_msg=name)
        assert result["label"] == oracle.label(found), name
        assert result["score"] == pytest.approx(oracle.score(expected), abs=2e-5), name
        assert all(round(number, 6) == number for number in [*found, result["score"]]), name
        assert result["truncated"] is oracle.is_truncated(text), name
        labels.add(result["label"])
    assert len(labels) > 1, "the test's checkpoint tells texts apart"


def test_the_id_of_a_json_event_is_from_its_field_its_header_or_its_place(json_story: Story) -> None:
    def place(name: str) -> str:
        return "{}-{}-{}".format(*json_story.sent[name].place)

    assert {name: fields(json_story.result(name))["id"] for name in json_story.cases if name.startswith("id ")} == {
        "id is text": "событие «1»",
        "id is an integer": "-17",
        "id is a large integer": "123456789012345678901234567890",
        "id is from the header": "из заголовка",
        "id goes before the header": "field",
        "id is no id, header": "header",
        "id is no id": place("id is no id"),
        "id is null": place("id is null"),
        "id is missing": place("id is missing"),
    }


def test_order_is_kept_per_key(json_story: Story) -> None:
    by_key: dict[bytes | None, list[int]] = defaultdict(list)
    for record in json_story.output:  # in the order of partition and offset
        if record.key and record.key.startswith(b"key "):
            by_key[record.key].append(int(fields(record)["id"]))
    assert len(by_key) == 20
    assert all(numbers == sorted(numbers) and len(numbers) == 30 for numbers in by_key.values())


def test_every_metric_is_there(json_story: Story) -> None:
    found = {name for name, _, _ in json_story.metrics.samples}
    wanted = """records_consumed_total results_published_total dead_letters_total tombstones_total records_skipped_total
        score_bucket batch_texts_bucket batch_tokens_bucket batch_padding_ratio_bucket stage_seconds_bucket
        end_to_end_seconds_bucket queue_depth consumer_lag_records consumer_lag_seconds assigned_partitions
        rebalances_total offset_resets_total duplicates_possible_total inference_last_success_timestamp_seconds
        inference_device_memory_bytes cache_hits_total ready model_info build_info"""
    assert {f"sentiment_worker_{name}" for name in wanted.split()} <= found
    stages = set(json_story.metrics.by("stage", "stage_seconds_count"))
    assert stages == {"wait", "tokenize", "forward", "publish", "commit"}
    success = json_story.metrics.get("inference_last_success_timestamp_seconds")
    assert abs(success - time.time()) < 600


def test_the_id_of_a_text_is_from_its_header_or_its_place(text_story: Story) -> None:
    assert fields(text_story.result("header id"))["id"] == "from header"
    sent = text_story.sent["looks like JSON"]
    assert fields(text_story.result("looks like JSON"))["id"] == "{}-{}-{}".format(*sent.place)


def test_a_plain_text_is_scored_as_the_model_scores_it(text_story: Story, oracle: Oracle) -> None:
    for name in text_story.expected("result"):
        expected = oracle.probabilities((text_story.sent[name].value or b"").decode())
        found = fields(text_story.result(name))["probabilities"]
        np.testing.assert_allclose(list(found.values()), expected, atol=2e-5, err_msg=name)


# Enrich


def test_enriched_events_keep_their_own_bytes(enrich_story: Story) -> None:
    for name in enrich_story.expected("result"):
        own, enriched = enrich_story.sent[name].value or b"", enrich_story.result(name).value or b""
        last_brace = own.rindex(b"}")
        added = enriched[last_brace : len(enriched) - len(own) + last_brace]
        assert enriched == own[:last_brace] + added + own[last_brace:], name
        assert added.startswith(b',"sentiment":'), name
        assert "label" in orjson.loads(added.removeprefix(b',"sentiment":')), name


def test_enriched_events_have_their_ids(enrich_story: Story) -> None:
    assert fields(enrich_story.result("odd bytes"))["id"] == "12345678901234567890123"
    assert fields(enrich_story.result("twice"))["id"] == "{}-{}-{}".format(*enrich_story.sent["twice"].place)


def test_the_dotted_path_is_followed(enrich_story: Story, oracle: Oracle) -> None:
    expected = oracle.probabilities(orjson.loads(OWN)["payload"]["text"])
    found = fields(enrich_story.result("odd bytes"))["probabilities"]
    np.testing.assert_allclose(list(found.values()), expected, atol=2e-5)
