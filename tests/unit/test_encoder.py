"""Results, enriched records and tombstones, byte for byte as the documentation of records says."""

import json
from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.events import (
    AFTER_YEAR_9999,
    CARD,
    INVALID_TIMES,
    MODEL,
    PROCESSED_AT,
    RESULT,
    TEN,
    FakeRecord,
    encode,
)
from worker.core.dead_letters import dead_letter
from worker.core.decoder import Decoder
from worker.core.encoder import Encoder, result_fields
from worker.core.events import Event, Failure, Outgoing
from worker.core.sentiment import LABELS, LabelSet, Sentiment
from worker.core.timestamps import iso_time, timestamp_ms


def test_a_record_becomes_the_documented_result_byte_for_byte() -> None:
    record = FakeRecord('{"id": 42, "text": "Какая гадость эта ваша заливная рыба!"}'.encode())
    event = Decoder().decode(record)
    assert event == Event("42", "Какая гадость эта ваша заливная рыба!")
    outgoing = encode(record, event)
    assert outgoing == Outgoing(b"k", RESULT, [("content-type", b"application/json")], TEN)


def test_a_result_says_whether_its_text_was_cut() -> None:
    value = encode(FakeRecord(b""), Event("42", "да"), truncated=True).value
    assert value == RESULT.replace(b'"truncated":false', b'"truncated":true')


@pytest.mark.parametrize("timestamp", [-1, -2])
def test_a_record_without_a_timestamp_has_a_null_event_time_and_goes_out_without(timestamp: int) -> None:
    record = FakeRecord(b"", timestamp=timestamp)
    outgoing = encode(record, Event("42", "да"))
    assert outgoing.value == RESULT.replace(b'"2026-11-23T10:00:00.000Z"', b"null")
    assert outgoing.timestamp is None
    assert timestamp_ms(record) is None


def test_the_first_moment_of_1970_is_a_timestamp() -> None:
    outgoing = encode(FakeRecord(b"", timestamp=0), Event("42", "да"))
    assert outgoing.value is not None
    assert orjson.loads(outgoing.value)["event_time"] == "1970-01-01T00:00:00.000Z"
    assert outgoing.timestamp == 0


def test_numbers_have_six_decimals_and_no_negative_zero() -> None:
    fields = result_fields("1", Sentiment("neutral", -1e-9, (1 / 3, 2 / 3, 1e-7)), False, "m", None, None, "now")
    assert orjson.dumps([fields["score"], fields["probabilities"]]) == (
        b'[0.0,{"negative":0.333333,"neutral":0.666667,"positive":0.0}]'
    )


@pytest.mark.parametrize("timestamp", [AFTER_YEAR_9999, 2**53, 2**63 - 1])
@pytest.mark.parametrize("output_mode", ["result", "enrich"])
def test_a_timestamp_beyond_the_year_9999_is_a_dead_letter(timestamp: int, output_mode: str) -> None:
    record = FakeRecord('{"text":"да"}'.encode(), timestamp=timestamp)
    encoder = Encoder(output_mode=output_mode)
    [failure] = encoder.encode([record], [Event("1", "да")], [CARD], [False], MODEL, PROCESSED_AT)
    assert isinstance(failure, Failure)
    assert (failure.stage, failure.reason) == ("publish", "invalid_timestamp")
    letter = dead_letter(record, failure, "0.1.0")
    assert dict(letter.headers)["source.timestamp"] == str(timestamp).encode()
    assert letter.timestamp is None


@pytest.mark.parametrize("name", ["content-type", "Content-Type", "CONTENT-TYPE", "cOnTeNt-TyPe"])
def test_the_content_type_is_replaced_however_it_is_written(name: str) -> None:
    headers = [("trace", b"1"), (name, b"text/plain"), ("trace", b"2"), ("empty", b""), ("null", None)]
    outgoing = encode(FakeRecord(b"", headers=headers), Event("42", "да"))
    kept = [("trace", b"1"), ("trace", b"2"), ("empty", b""), ("null", None)]
    assert outgoing.headers == [*kept, ("content-type", b"application/json")]
    assert isinstance(outgoing.headers, list)


def test_a_header_whose_name_only_begins_with_content_type_is_kept() -> None:
    outgoing = encode(FakeRecord(b"", headers=[("content-type-2", b"x")]), Event("42", "да"))
    assert outgoing.headers[0] == ("content-type-2", b"x")


def test_a_null_key_stays_null() -> None:
    assert encode(FakeRecord(b"", key=None), Event("42", "да")).key is None


def test_a_tombstone_goes_on_as_it_is() -> None:
    headers = [("content-type", b"text/plain"), ("x", None)]
    record = FakeRecord(None, headers=tuple(headers))
    assert Encoder().tombstone(record) == Outgoing(b"k", None, headers, TEN)
    assert Encoder().tombstone(replace(record, timestamp=-1)).timestamp is None
    assert isinstance(Encoder().tombstone(record).headers, list)


# --- Enriched ---


def enriched(value: bytes) -> bytes:
    record = FakeRecord(value)
    event = Decoder(output_mode="enrich").decode(record)
    assert isinstance(event, Event)
    published = encode(record, event, "enrich").value
    assert published is not None
    return published


OWN = [
    '{"text":"да"}',
    '  {\n  "text": "да"  ,\t"b": [1, 2.50, 1e3, {}]\r\n}\n',
    '{"text":"да","n":123456789012345678901234567890,"f":0.1000,"e":1E+2,"z":-0}',
    r'{"text":"\u0434\u0430","s":"}","slash":"\/"}',
    '{"text":"нет","a":1,"a":2,"text":"да","":{"sentiment":"x"}}',
    '{"text":"да","inside":{"deep":{}}} \n\n',
]


@pytest.mark.parametrize("own", OWN)
def test_enriched_bytes_are_the_inputs_own_with_one_field_more(own: str) -> None:
    value = own.encode()
    published = enriched(value)
    end = value.rindex(b"}")
    field = b',"sentiment":'
    assert published.startswith(value[:end] + field)
    assert published.endswith(value[end:])
    result = published[len(value[:end] + field) : len(published) - len(value[end:])]
    assert result == RESULT.replace(b'"id":"42"', b'"id":"texts-3-1201"')
    assert json.loads(published).items() == {**json.loads(value), "sentiment": json.loads(result)}.items()


def test_an_enriched_record_keeps_key_and_timestamp_and_says_json() -> None:
    record = FakeRecord('{"text":"да"}'.encode(), headers=[("Content-Type", b"x"), ("a", b"b")])
    outgoing = encode(record, Event("1", "да"), "enrich")
    assert (outgoing.key, outgoing.timestamp) == (b"k", TEN)
    assert outgoing.headers == [("a", b"b"), ("content-type", b"application/json")]


# --- Times ---


@pytest.mark.parametrize("output_mode", ["result", "enrich"])
@pytest.mark.parametrize(
    ("told", "time"),
    [(b"0", "1970-01-01T00:00:00.000Z"), (b"253402300799999", "9999-12-31T23:59:59.999Z")]
    + [(told, "2026-11-23T10:00:00.000Z") for told in INVALID_TIMES],
)
def test_the_first_timestamp_is_the_event_time_and_not_the_results_timestamp(
    told: bytes | None, time: str, output_mode: str
) -> None:
    record = FakeRecord(b'{"text": "x"}', headers=[("event.timestamp", told), ("other", b"1")])
    plain = FakeRecord(b'{"text": "x"}')
    encoder = Encoder(output_mode=output_mode)
    results = encoder.encode([record, plain], [Event("1", "x")] * 2, [CARD] * 2, [False] * 2, MODEL, PROCESSED_AT)
    for outgoing, expected in zip(results, (time, "2026-11-23T10:00:00.000Z"), strict=True):
        assert isinstance(outgoing, Outgoing)
        fields = orjson.loads(outgoing.value or b"")
        assert fields.get("sentiment", fields)["event_time"] == expected
        assert outgoing.timestamp == TEN


def test_a_record_without_a_timestamp_may_have_a_first_one() -> None:
    told = FakeRecord(b"{}", headers=[("event.timestamp", b"%d" % TEN)], timestamp=-1)
    outgoing = encode(told, Event("1", "x"))
    assert orjson.loads(outgoing.value or b"")["event_time"] == "2026-11-23T10:00:00.000Z"
    assert outgoing.timestamp is None


@pytest.mark.parametrize("output_mode", ["result", "enrich"])
def test_results_and_tombstones_may_be_dated_now(output_mode: str) -> None:
    record = FakeRecord(b'{"text": "x"}')
    dated, now = (Encoder(output_mode=output_mode, result_timestamp=setting) for setting in ("event", "now"))
    one, other = (
        encoder.encode([record], [Event("1", "x")], [CARD], [False], MODEL, PROCESSED_AT)[0] for encoder in (dated, now)
    )
    assert isinstance(one, Outgoing)
    assert one.timestamp == TEN
    assert other == one._replace(timestamp=None), "the event's time in the value stays"
    assert dated.tombstone(record).timestamp == TEN
    assert now.tombstone(record) == dated.tombstone(record)._replace(timestamp=None)


# --- Any results ---


FINITE = st.floats(0, 1) | st.integers(-1_000_000, 1_000_000).map(lambda millionths: millionths / 1_000_000)


@given(
    st.lists(
        st.tuples(
            st.text(),
            st.sampled_from(LABELS),
            st.tuples(FINITE, FINITE, FINITE, FINITE),
            st.booleans(),
            st.integers(0, 2**62),
            st.none() | st.integers(-2, 2**43),
        ),
        max_size=5,
    ),
    st.text(),
    st.text(),
    st.booleans(),
)
def test_results_are_the_bytes_of_their_fields(scored: list[Any], topic: str, model: str, has_windows: bool) -> None:
    records = [FakeRecord(b"", topic=topic, offset=offset, timestamp=at) for *_, offset, at in scored]
    sentiments = [Sentiment(label, numbers[0], numbers[1:]) for _, label, numbers, *_ in scored]
    truncated = [is_cut for *_, is_cut, _, _ in scored]
    events = [Event(id, "да") for id, *_ in scored]
    windows = list(range(1, 1 + len(scored))) if has_windows else None
    results = Encoder().encode(records, events, sentiments, truncated, model, PROCESSED_AT, windows=windows)
    counts: list[Any] = windows or [None] * len(scored)
    for record, event, sentiment, is_cut, count, result in zip(
        records, events, sentiments, truncated, counts, results, strict=True
    ):
        source = {"topic": topic, "partition": record.partition, "offset": record.offset}
        event_time = iso_time(record.timestamp) if timestamp_ms(record) is not None else None
        fields = result_fields(event.id, sentiment, is_cut, model, source, event_time, PROCESSED_AT, windows=count)
        assert fields.get("windows") == count
        assert isinstance(result, Outgoing)
        assert result.value == orjson.dumps(fields)
        assert result.timestamp == (record.timestamp if timestamp_ms(record) is not None else None)


# --- Any labels ---


NAMES = st.lists(st.text(min_size=1), min_size=1, max_size=7, unique=True)  # with %, quotes and all else


@st.composite
def label_sets(draw: st.DrawFn) -> LabelSet:
    names = tuple(draw(NAMES))
    weights = draw(st.none() | st.just((0.5,) * len(names)))
    return LabelSet(names, "sigmoid", weights, draw(st.none() | st.floats(0, 1) | st.just(0.5)))


@given(label_sets(), st.data())
def test_results_of_any_labels_are_the_bytes_of_their_fields(labels: LabelSet, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 4))
    probabilities = st.tuples(*[FINITE] * len(labels.names))
    scores = st.none() if labels.weights is None else FINITE
    drawn = [data.draw(st.tuples(st.sampled_from(labels.names), scores, probabilities)) for _ in range(count)]
    sentiments = [Sentiment(*each) for each in drawn]
    records, events = [FakeRecord(b"")] * count, [Event("42", "да")] * count
    results = Encoder().encode(records, events, sentiments, [False] * count, MODEL, PROCESSED_AT, labels=labels)
    for sentiment, result in zip(sentiments, results, strict=True):
        source = {"topic": "texts", "partition": 3, "offset": 1201}
        time = "2026-11-23T10:00:00.000Z"
        fields = result_fields("42", sentiment, False, MODEL, source, time, PROCESSED_AT, labels=labels)
        assert isinstance(result, Outgoing)
        assert result.value == orjson.dumps(fields)


def test_a_result_of_other_labels() -> None:
    labels = LabelSet(("toxic", '100 % "insult"'), "sigmoid", None, 0.5)
    sentiments = [Sentiment("toxic", None, (0.75, 0.4999996)), Sentiment("toxic", None, (0.4, 0.1))]
    args = [FakeRecord(b"")] * 2, [Event("42", "да")] * 2, sentiments, [False] * 2, MODEL, PROCESSED_AT
    first, second = Encoder().encode(*args, labels=labels)
    assert isinstance(first, Outgoing)
    assert isinstance(second, Outgoing)
    assert first.value == RESULT.replace(
        b'"label":"negative","score":-0.589495', b'"label":"toxic","score":null'
    ).replace(
        b'"probabilities":{"negative":0.787045,"neutral":0.494782,"positive":0.19755}',
        b'"probabilities":{"toxic":0.75,"100 % \\"insult\\"":0.5},"labels":["toxic","100 % \\"insult\\""]',
    ), "what is listed are the labels whose probability, as it is written, reaches the threshold"
    assert b'"labels":[],"truncated"' in (second.value or b"")


@pytest.mark.parametrize("options", [{"output_mode": "enrich"}, {"output_format": "cloudevents"}])
def test_a_null_score_stands_in_every_form_of_a_result(options: dict[str, str]) -> None:
    labels = LabelSet(("a", "b"), "softmax", None)
    record = FakeRecord(b'{"text": "x"}')
    sentiments = [Sentiment("a", None, (0.75, 0.25))]
    (result,) = Encoder(**options).encode(
        [record], [Event("1", "x")], sentiments, [False], MODEL, PROCESSED_AT, labels=labels
    )
    assert isinstance(result, Outgoing)
    fields = orjson.loads(result.value or b"")
    fields = fields.get("sentiment", fields)
    assert (fields["score"], fields["probabilities"], "labels" in fields) == (None, {"a": 0.75, "b": 0.25}, False)
