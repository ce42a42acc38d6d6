"""The newest outcomes: what a row of them tells, how many are kept, and how much is held meanwhile."""

import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from tests.support.outcomes import BAD, outcome
from worker.core.avro_encoder import AvroEncoder, probabilities_in
from worker.core.decoder import Decoder
from worker.core.encoder import Encoder
from worker.core.events import Event, Headers, Outgoing
from worker.core.sentiment import LabelSet, Sentiment
from worker.http.recent_outcomes import HELD_BYTES, KEPT, RecentOutcomes
from worker.kafka.delivery import Outcome
from worker.kafka.producer_records import ProducerRecord


def recent(*, texts: bool = False) -> RecentOutcomes:
    return RecentOutcomes(Decoder(), texts=texts)


def ids(rows: Iterable[list[Any]]) -> list[str]:
    return [row[1] for row in rows]


def test_a_result_is_told_with_its_probabilities_and_without_its_text() -> None:
    rows = recent()
    rows.add([outcome(1)])
    ((_, id, label, score, probabilities, latency_ms, text),), letters = rows.take()
    assert (id, label, score, text) == ("e1", "positive", 0.75, None)
    assert probabilities == {"negative": 0.1, "neutral": 0.2, "positive": 0.85}
    assert latency_ms > 0
    assert not letters
    assert rows.take() == ([], []), "told once"
    assert len(rows.results) == 1, "kept for the next page"


def test_a_latency_that_cannot_be_right_is_not_told() -> None:
    rows = recent()
    told = outcome(1)
    rows.add([replace(told, record=replace(told.record, timestamp=1_795_428_000))])  # in seconds
    ((*_, latency_ms, _),), _ = rows.take()
    assert latency_ms is None


def test_texts_are_told_where_they_are_switched_on_and_cut() -> None:
    rows = recent(texts=True)
    rows.add([outcome(1), outcome(2, value=json.dumps({"id": "e2", "text": "я" * 1_000}).encode())])
    results, _ = rows.take()
    assert results[0][-1] == "текст 1"
    assert results[1][-1] == "я" * 240 + "…"


def test_a_dead_letter_is_told_with_its_place_and_reason() -> None:
    rows = recent()
    rows.add([outcome(7, value=b"{broken", failure=BAD)])
    results, ((_, place, stage, reason, message),) = rows.take()
    assert not results
    assert (place, stage, reason, message) == ("texts-3 @ 7", "decode", "invalid_json", BAD.message)


def test_the_last_of_each_are_kept_however_many_come_at_once() -> None:
    rows = recent()
    for begin in range(0, 5_000, 100):
        rows.add([outcome(number, failure=BAD if number % 2 else None) for number in range(begin, begin + 100)])
    rows.take()
    assert ids(rows.results) == [f"e{number}" for number in range(4_900, 5_000, 2)]
    assert ids(rows.dead_letters) == [f"texts-3 @ {number}" for number in range(4_901, 5_001, 2)]
    rows.add([outcome(number, failure=BAD) for number in range(5_000, 5_100)])
    rows.take()
    assert len(rows.results) == len(rows.dead_letters) == KEPT, "failures alone drive no result out"


def test_few_bytes_of_records_are_held_until_they_are_read() -> None:
    rows = recent()
    large = json.dumps({"id": "large", "text": "x", "more": "y" * (HELD_BYTES // 3)}).encode()
    rows.add([outcome(number, value=large) for number in range(40)])
    assert sum(len(record.value or b"") for record, *_ in rows._new_results) <= HELD_BYTES
    rows.take()
    assert not rows._new_results
    rows.add([outcome(1, value=large)])
    assert ids(rows.take()[0]) == ["large"], "the newest is told whatever its size"


TOXIC = LabelSet(tuple(f"l{number}" for number in range(20)), "sigmoid", None, 0.5)


def labelled(labels: LabelSet, value: bytes, headers: Headers = (), **options: str) -> Outcome:
    """A result of other labels, without a score."""
    plain = outcome(1, value=value)
    record = replace(plain.record, headers=headers)
    sentiment = Sentiment(labels.names[-1], None, tuple(number / 20 for number in range(len(labels.names))))
    (result,) = Encoder(**options).encode(
        [record], [Event("e1", "")], [sentiment], [False], "model@0", "now", labels=labels
    )
    assert isinstance(result, Outgoing)
    return Outcome(record, ProducerRecord("sentiment", result, 3), None, sentiment)


ENVELOPE = b'{"specversion":"1.0","id":"e1","source":"/s","type":"t","sentiment":"mine","data":{"text":"x"}}'


@pytest.mark.parametrize(
    ("value", "headers", "options"),
    [
        (b'{"id":"e1","text":"x"}', (), {}),
        (b'{"id":"e1","text":"x","data":{},"probabilities":1}', (), {"output_mode": "enrich"}),
        (b'{"id":"e1","text":"x","data":{"sentiment":{}}}', (), {"output_mode": "enrich"}),
        (ENVELOPE, (("content-type", b"application/cloudevents+json"),), {"output_mode": "enrich"}),
        (ENVELOPE, (("content-type", b"application/cloudevents+json"),), {}),
        (ENVELOPE, (("content-type", b"application/cloudevents+json"),), {"output_format": "cloudevents"}),
    ],
)
def test_probabilities_are_told_by_the_names_of_the_model_that_scored(
    value: bytes, headers: Headers, options: dict[str, str]
) -> None:
    rows = recent()
    rows.add([labelled(TOXIC, value, headers, **options), outcome(2)])
    (row, other), _ = rows.take()
    assert row[2:5] == ["l19", None, {f"l{number}": number / 20 for number in range(19, 11, -1)}], "the largest eight"
    assert other[2:5] == ["positive", 0.75, {"negative": 0.1, "neutral": 0.2, "positive": 0.85}]


def test_probabilities_of_a_result_in_avro_are_told_too() -> None:
    rows = RecentOutcomes(Decoder(), texts=False, probabilities=probabilities_in)
    plain = outcome(1)
    sentiment = Sentiment("toxic", None, (0.75, 0.25))
    (result,) = AvroEncoder(schema_id=1).encode(
        [plain.record], [Event("e1", "")], [sentiment], [False], "model@0", "2026-11-23T10:00:00.021Z",
        labels=LabelSet(("toxic", "insult"), "sigmoid", None),
    )  # fmt: skip
    assert isinstance(result, Outgoing)
    rows.add([Outcome(plain.record, ProducerRecord("sentiment", result, 3), None, sentiment)])
    ((*_, probabilities, _, _),), _ = rows.take()
    assert probabilities == {"toxic": 0.75, "insult": 0.25}
