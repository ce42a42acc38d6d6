"""Results in Avro: the bytes that fastavro writes of the same fields, in Confluent's framing; headers, keys and times."""

import io
import json
from datetime import datetime
from typing import Any

import fastavro
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.events import AFTER_YEAR_9999, CARD, MODEL, PROCESSED_AT, TEN, FakeRecord
from tests.unit.test_encoder import FINITE, NAMES
from worker.core.avro_encoder import AvroEncoder, probabilities_in
from worker.core.encoder import Encoder, result_fields
from worker.core.events import Event, Failure, Outgoing
from worker.core.schemas import result_avro_schema
from worker.core.sentiment import LabelSet, Sentiment
from worker.core.timestamps import iso_time, timestamp_ms

SCHEMA = fastavro.parse_schema(result_avro_schema())
FRAME = b"\0\x00\x01\x02\x03"
ENCODER = AvroEncoder(schema_id=0x10203)


def encoded(record: FakeRecord, encoder: Encoder = ENCODER) -> Outgoing:
    [result] = encoder.encode([record], [Event("42", "да")], [CARD], [False], MODEL, PROCESSED_AT)
    assert isinstance(result, Outgoing)
    return result


def fields_of(value: bytes | None) -> dict[str, Any]:
    """What a reader of Avro finds in a result: after the framing one record, and nothing behind it."""
    assert value is not None
    assert value.startswith(FRAME)
    stream = io.BytesIO(value[len(FRAME) :])
    fields = fastavro.schemaless_reader(stream, SCHEMA, None)
    assert not stream.read()
    assert isinstance(fields, dict)
    return fields


def written_by_fastavro(fields: dict[str, Any]) -> bytes:
    """A result in JSON's fields, as fastavro writes them with the framing."""
    times = {
        name: None if fields[name] is None else round(datetime.fromisoformat(fields[name]).timestamp() * 1000)
        for name in ("event_time", "processed_at")
    }
    stream = io.BytesIO()
    fastavro.schemaless_writer(stream, SCHEMA, {**fields, **times})
    return FRAME + stream.getvalue()


def test_a_result_holds_the_documented_fields() -> None:
    outgoing = encoded(FakeRecord(b"", headers=[("trace", b"1"), ("Content-Type", b"application/json")]))
    assert (outgoing.key, outgoing.timestamp) == (b"k", TEN)
    assert outgoing.headers == [("trace", b"1"), ("content-type", b"application/avro")]
    fields = fields_of(outgoing.value)
    assert fields.pop("event_time").isoformat() == "2026-11-23T10:00:00+00:00"
    assert fields.pop("processed_at").isoformat() == "2026-11-23T10:00:00.021000+00:00"
    assert fields == {
        "id": "42",
        "label": "negative",
        "score": -0.589495,
        "probabilities": {"negative": 0.787045, "neutral": 0.494782, "positive": 0.19755},
        "labels": None,
        "truncated": False,
        "windows": None,
        "model": MODEL,
        "source": {"topic": "texts", "partition": 3, "offset": 1201},
    }


@st.composite
def label_sets(draw: st.DrawFn) -> LabelSet:
    names = tuple(draw(NAMES))
    weights = draw(st.none() | st.just((0.5,) * len(names)))
    return LabelSet(names, "sigmoid", weights, draw(st.none() | st.floats(0, 1) | st.just(0.5)))


@given(label_sets(), st.booleans(), st.text(), st.integers(0, 2**31 - 1), st.data())
def test_results_are_the_bytes_that_fastavro_writes(
    labels: LabelSet, has_windows: bool, topic: str, partition: int, data: st.DataObject
) -> None:
    scored = data.draw(
        st.lists(
            st.tuples(
                st.text(),
                st.sampled_from(labels.names),
                st.none() if labels.weights is None else FINITE,
                st.tuples(*[FINITE] * len(labels.names)),
                st.booleans(),
                st.integers(0, 2**63 - 1),
                st.none() | st.integers(-2, 2**43),
                st.integers(1, 64),
            ),
            max_size=4,
        )
    )
    records = [
        FakeRecord(b"", topic=topic, partition=partition, offset=offset, timestamp=at)  # type: ignore[arg-type]
        for *_, offset, at, _ in scored
    ]
    sentiments = [Sentiment(label, score, numbers) for _, label, score, numbers, *_ in scored]
    events = [Event(id, "да") for id, *_ in scored]
    truncated = [is_cut for *_, is_cut, _, _, _ in scored]
    windows = [count for *_, count in scored] if has_windows else None
    results = ENCODER.encode(
        records, events, sentiments, truncated, MODEL, PROCESSED_AT, labels=labels, windows=windows
    )
    counts: list[Any] = windows or [None] * len(scored)
    for record, event, sentiment, is_cut, count, result in zip(
        records, events, sentiments, truncated, counts, results, strict=True
    ):
        source = {"topic": topic, "partition": partition, "offset": record.offset}
        time = iso_time(record.timestamp) if timestamp_ms(record) is not None else None
        fields = result_fields(
            event.id, sentiment, is_cut, MODEL, source, time, PROCESSED_AT, labels=labels, windows=count
        )
        assert isinstance(result, Outgoing)
        assert result.value == written_by_fastavro(fields)
        assert result.timestamp == timestamp_ms(record)
        assert probabilities_in(result.value) == fields["probabilities"]


def test_the_numbers_are_the_ones_that_json_has() -> None:
    sentiment = Sentiment("neutral", -1e-9, (1 / 3, 2 / 3, 1e-7))
    args = ([FakeRecord(b"")], [Event("1", "")], [sentiment], [False], MODEL, PROCESSED_AT)
    ([in_avro], [in_json]) = (encoder.encode(*args) for encoder in (ENCODER, Encoder()))
    assert isinstance(in_avro, Outgoing)
    assert isinstance(in_json, Outgoing)
    names = ("score", "probabilities")
    fields, expected = fields_of(in_avro.value), json.loads(in_json.value or b"")
    assert [fields[name] for name in names] == [expected[name] for name in names]
    assert str(fields["score"]) == "0.0", "no negative zero"


def test_a_replayed_record_keeps_its_first_time_in_the_value_alone() -> None:
    outgoing = encoded(FakeRecord(b"", headers=[("event.timestamp", b"1000")]))
    assert fields_of(outgoing.value)["event_time"].isoformat() == "1970-01-01T00:00:01+00:00"
    assert outgoing.timestamp == TEN


def test_results_may_be_dated_now() -> None:
    outgoing = encoded(FakeRecord(b""), AvroEncoder(schema_id=0x10203, result_timestamp="now"))
    assert outgoing.timestamp is None
    assert fields_of(outgoing.value)["event_time"].isoformat() == "2026-11-23T10:00:00+00:00"


@pytest.mark.parametrize("timestamp", [AFTER_YEAR_9999, 2**63 - 1])
def test_a_timestamp_beyond_the_year_9999_is_a_dead_letter_and_its_neighbour_a_result(timestamp: int) -> None:
    records = [FakeRecord(b""), FakeRecord(b"", timestamp=timestamp)]
    result, failure = ENCODER.encode(records, [Event("1", "")] * 2, [CARD] * 2, [False] * 2, MODEL, PROCESSED_AT)
    assert isinstance(result, Outgoing)
    assert isinstance(failure, Failure)
    assert failure.reason == "invalid_timestamp"


def test_a_tombstone_has_no_framing() -> None:
    record = FakeRecord(None, headers=[("content-type", b"text/plain")])
    assert ENCODER.tombstone(record) == Encoder().tombstone(record) == Outgoing(b"k", None, [*record.headers], TEN)


def test_the_attributes_of_a_cloud_event_are_left_out() -> None:
    headers = [("ce_specversion", b"1.0"), ("ce_id", b"7"), ("content-type", b"application/json"), ("a", b"1")]
    assert encoded(FakeRecord(b"", headers=headers)).headers == [("a", b"1"), ("content-type", b"application/avro")]


def test_no_records_are_no_results() -> None:
    assert ENCODER.encode([], [], [], [], MODEL, PROCESSED_AT) == []
