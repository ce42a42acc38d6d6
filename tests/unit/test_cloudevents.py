"""CloudEvents, read and written, with the CloudEvents SDK for Python as the peer."""

import base64
from datetime import UTC, datetime
from typing import Any

import orjson
import pytest
from cloudevents.core.bindings.kafka import (
    KafkaMessage,
    from_kafka_event,
    to_binary_event,
    to_structured_event,
)
from cloudevents.core.v1.event import CloudEvent
from hypothesis import given
from hypothesis import strategies as st

from tests.support.events import CARD, MODEL, PROCESSED_AT, RESULT, FakeRecord
from worker.core.cloudevents import end_of_data, source_of
from worker.core.decoder import Decoder
from worker.core.encoder import Encoder
from worker.core.events import Decoded, Event, Failure, Headers, Null, Outgoing

STRUCTURED = (("content-type", b"application/cloudevents+json; charset=utf-8"),)
BINARY = (
    ("ce_specversion", b"1.0"),
    ("ce_id", b"7"),
    ("ce_source", b"/shop"),
    ("ce_type", b"review.written"),
    ("content-type", b"application/json"),
)


def decode(value: bytes | None, headers: Headers, **options: Any) -> Decoded:
    decoder, record = Decoder(**options), FakeRecord(value, headers=headers)
    decoded = decoder.decode(record)
    assert decoder.decode_all([record]) == [decoded]
    return decoded


def envelope(**attributes: Any) -> bytes:
    required = {"specversion": "1.0", "id": "7", "source": "/shop", "type": "review.written"}
    return orjson.dumps({name: value for name, value in (required | attributes).items() if value is not ...})


def without(name: str) -> Headers:
    return tuple(header for header in BINARY if header[0] != name)


def with_header(name: str, value: bytes | None) -> Headers:
    return (*without(name), (name, value))


def encoded(record: FakeRecord, **options: Any) -> Outgoing:
    event = Decoder(output_mode=options.get("output_mode", "result")).decode(record)
    assert isinstance(event, Event)
    [outgoing] = Encoder(**options).encode([record], [event], [CARD], [False], MODEL, PROCESSED_AT)
    assert isinstance(outgoing, Outgoing)
    return outgoing


# --- The peer ---


def peers_event(data: Any, **attributes: Any) -> CloudEvent:
    given = {
        "id": "отзыв 7",
        "source": "/shop",
        "type": "review.written",
        "time": datetime.now(UTC),
        "partitionkey": "k",
    }
    return CloudEvent(attributes=given | attributes, data=data)


@pytest.mark.parametrize("write", [to_binary_event, to_structured_event])
@pytest.mark.parametrize(
    ("data", "content_type"),
    [
        ({"text": "Хорошо"}, "application/json"),
        ({"text": "Хорошо"}, "application/vnd.shop.review+json"),
        ("Хорошо", "text/plain; charset=utf-8"),
    ],
)
@pytest.mark.parametrize("input_format", ["json", "text"])
def test_what_the_peer_writes_is_read(write: Any, data: Any, content_type: str, input_format: str) -> None:
    message = write(peers_event(data, datacontenttype=content_type))
    headers = tuple(message.headers.items())
    assert decode(message.value, headers, input_format=input_format) == Event("отзыв 7", "Хорошо")


@pytest.mark.parametrize("write", [to_binary_event, to_structured_event])
def test_the_peer_reads_what_is_written(write: Any) -> None:
    message = write(peers_event({"text": "Хорошо"}, datacontenttype="application/json"))
    record = FakeRecord(message.value, b"k", (*message.headers.items(), ("traceparent", b"00-1")))
    outgoing = encoded(record, output_format="cloudevents", group_id="my group")
    assert len({name for name, _ in outgoing.headers}) == len(outgoing.headers), "a header is there twice"
    headers = {name: value for name, value in outgoing.headers if value is not None}
    assert headers["traceparent"] == b"00-1"
    event = from_kafka_event(KafkaMessage(headers, outgoing.key, outgoing.value or b""))
    assert (event.get_specversion(), event.get_id(), event.get_source(), event.get_type()) == (
        "1.0", "texts-3-1201", "/sentiment-worker/my%20group", "sentiment-worker.result"
    )  # fmt: skip
    assert (event.get_subject(), event.get_time()) == ("отзыв 7", datetime(2026, 11, 23, 10, 0, 0, 21_000, UTC))
    assert (event.get_datacontenttype(), event.get_extension("partitionkey")) == ("application/json", "k")
    assert event.get_data() == {**orjson.loads(RESULT), "id": "отзыв 7"}


@pytest.mark.parametrize("write", [to_binary_event, to_structured_event])
def test_the_peer_reads_an_enriched_event_as_the_one_that_it_was(write: Any) -> None:
    written = peers_event({"text": "Хорошо", "more": {"data": []}}, datacontenttype="application/json")
    message = write(written)
    record = FakeRecord(message.value, b"k", tuple(message.headers.items()))
    outgoing = encoded(record, output_mode="enrich")
    assert outgoing.headers == list(message.headers.items())
    read = from_kafka_event(KafkaMessage(dict(message.headers), outgoing.key, outgoing.value or b""))
    assert read.get_attributes() == written.get_attributes()
    data: Any = read.get_data()
    assert data.pop("sentiment") == {**orjson.loads(RESULT), "id": "отзыв 7"}
    assert data == written.get_data()


# --- Reading ---


@pytest.mark.parametrize(
    ("value", "headers", "options"),
    [
        (b'{"id": "other", "text": "OK"}', BINARY, {}),
        (b'{"body": {"text": "OK"}}', BINARY, {"text_field": "body.text"}),
        (b'{"body": "OK"}', BINARY, {"text_fields": {"texts": "body"}}),
        (b'{"text": "OK"}', without("content-type"), {}),
        (b"OK", without("content-type"), {"input_format": "text"}),
        (b"OK", with_header("content-type", b"text/plain"), {}),
        (envelope(data={"text": "OK"}), STRUCTURED, {}),
        (envelope(data={"text": "OK"}, data_base64=None), (*BINARY, *STRUCTURED), {}),
        (envelope(data="OK", datacontenttype="Text/Plain"), STRUCTURED, {}),
        (envelope(data_base64=base64.b64encode(b'{"text": "OK"}').decode()), STRUCTURED, {}),
        (envelope(data_base64=base64.b64encode(b"OK").decode(), datacontenttype="text/plain"), STRUCTURED, {}),
        (envelope(data={"text": "OK"}), (("Content-Type", b"APPLICATION/CloudEvents+JSON"),), {}),
    ],
)
def test_what_is_read(value: bytes, headers: Headers, options: dict[str, Any]) -> None:
    assert decode(value, headers, **options) == Event("7", "OK")
    assert Decoder(**options).id_of(FakeRecord(value, headers=headers)) == "7"


@pytest.mark.parametrize(
    ("value", "headers", "reason"),
    [
        (b'{"text": "OK"}', with_header("ce_specversion", b"0.3"), "invalid_cloudevent"),
        (b'{"text": "OK"}', with_header("ce_specversion", None), "invalid_cloudevent"),
        (b'{"text": "OK"}', without("ce_id"), "invalid_cloudevent"),
        (b'{"text": "OK"}', with_header("ce_source", b""), "invalid_cloudevent"),
        (b'{"text": "OK"}', with_header("ce_type", b"\xff"), "invalid_cloudevent"),
        (b"<text>OK</text>", with_header("content-type", b"application/xml"), "invalid_cloudevent"),
        (b"", BINARY, "invalid_json"),
        (b'"OK"', BINARY, "not_an_object"),
        (b"\xff", with_header("content-type", b"text/plain"), "invalid_utf8"),
        (b"", with_header("content-type", b"text/plain"), "empty_text"),
        (envelope(data={"text": "OK"}, specversion="2.0"), STRUCTURED, "invalid_cloudevent"),
        (envelope(data={"text": "OK"}, specversion=1.0), STRUCTURED, "invalid_cloudevent"),
        (envelope(data={"text": "OK"}, id=7), STRUCTURED, "invalid_cloudevent"),
        (envelope(data={"text": "OK"}, type=...), STRUCTURED, "invalid_cloudevent"),
        (envelope(data={"text": "OK"}, datacontenttype=1), STRUCTURED, "invalid_cloudevent"),
        (envelope(data={"text": "OK"}, datacontenttype="image/png"), STRUCTURED, "invalid_cloudevent"),
        (envelope(data={"text": "OK"}, data_base64="e30="), STRUCTURED, "invalid_cloudevent"),
        (envelope(data_base64="*"), STRUCTURED, "invalid_cloudevent"),
        (envelope(data_base64=5), STRUCTURED, "invalid_cloudevent"),
        (envelope(), STRUCTURED, "missing_text"),
        (envelope(data=None), STRUCTURED, "not_an_object"),
        (envelope(data="OK"), STRUCTURED, "not_an_object"),
        (envelope(data=5, datacontenttype="text/plain"), STRUCTURED, "text_not_string"),
        (envelope(data={"text": 5}), STRUCTURED, "text_not_string"),
        (envelope(text="OK", data={}), STRUCTURED, "missing_text"),
        (b"[]", STRUCTURED, "not_an_object"),
        (b"{", STRUCTURED, "invalid_json"),
        (b"\xff", STRUCTURED, "invalid_utf8"),
        (b"[%b]" % envelope(), (("content-type", b"application/cloudevents-batch+json"),), "invalid_cloudevent"),
        (b"\0", (("content-type", b"application/cloudevents+avro"),), "invalid_cloudevent"),
    ],
)
def test_what_becomes_a_dead_letter(value: bytes, headers: Headers, reason: str) -> None:
    for input_format in ("json", "text"):
        failure = decode(value, headers, input_format=input_format)
        assert isinstance(failure, Failure)
        assert (failure.stage, failure.reason) == ("decode", reason)
    assert Decoder().id_of(FakeRecord(value, headers=headers))


@pytest.mark.parametrize(
    ("value", "headers", "reason"),
    [
        (b"OK", with_header("content-type", b"text/plain"), "not_an_object"),
        (envelope(data_base64=base64.b64encode(b'{"text": "OK"}').decode()), STRUCTURED, "not_an_object"),
        (b'{"text": "OK", "sentiment": 1}', BINARY, "field_exists"),
        (envelope(data={"text": "OK", "sentiment": 1}), STRUCTURED, "field_exists"),
    ],
)
def test_what_cannot_be_enriched(value: bytes, headers: Headers, reason: str) -> None:
    failure = decode(value, headers, output_mode="enrich")
    assert isinstance(failure, Failure)
    assert failure.reason == reason


def test_a_null_stays_a_tombstone() -> None:
    assert decode(None, BINARY) is decode(None, STRUCTURED) is Null.TOMBSTONE


@pytest.mark.parametrize("headers", [without("ce_specversion"), (("ce_id", b"9"),), (("content-type", b"text/xml"),)])
def test_other_records_are_read_by_the_input_format(headers: Headers) -> None:
    assert decode(b'{"id": 5, "text": "OK"}', headers) == Event("5", "OK")


@given(st.binary(), st.sampled_from([BINARY, STRUCTURED, without("content-type")]))
def test_nothing_raises(value: bytes, headers: Headers) -> None:
    for options in ({}, {"output_mode": "enrich"}, {"input_format": "text"}):
        record = FakeRecord(value, headers=headers)
        decoder = Decoder(**options)
        assert isinstance(decoder.decode(record), Event | Failure)
        assert decoder.id_of(record)


# --- Writing ---


def test_a_result_is_not_the_event_that_it_is_about() -> None:
    record = FakeRecord(b'{"text": "OK"}', headers=(*BINARY, ("ce_traceparent", b"00-2"), ("traceparent", b"00-1")))
    assert encoded(record).headers == [("traceparent", b"00-1"), ("content-type", b"application/json")]
    kept = [name for name, _ in encoded(record, output_format="cloudevents").headers]
    assert kept == [
        "ce_traceparent", "traceparent", "ce_specversion", "ce_id", "ce_source", "ce_type", "ce_time", "ce_subject",
        "content-type",
    ]  # fmt: skip


def test_a_record_that_is_no_cloud_event_has_a_result_that_is_one() -> None:
    outgoing = encoded(FakeRecord(b'{"id": "", "text": "OK"}'), output_format="cloudevents", group_id="g")
    assert outgoing.value == RESULT.replace(b'"42"', b'""')
    assert outgoing.headers == [
        ("ce_specversion", b"1.0"),
        ("ce_id", b"texts-3-1201"),
        ("ce_source", b"/sentiment-worker/g"),
        ("ce_type", b"sentiment-worker.result"),
        ("ce_time", PROCESSED_AT.encode()),
        ("content-type", b"application/json"),
    ]


def test_a_source_is_a_uri_reference() -> None:
    assert source_of("a/b группа") == b"/sentiment-worker/a%2Fb%20%D0%B3%D1%80%D1%83%D0%BF%D0%BF%D0%B0"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.just("data"), inner, max_size=3),
    max_leaves=10,
)


@given(
    st.dictionaries(st.text(max_size=5) | st.just('"data": {'), JSON, max_size=4),
    st.dictionaries(st.text(max_size=5), JSON, min_size=1, max_size=4),
    st.dictionaries(st.text(max_size=5), JSON, max_size=4),
)
def test_data_is_found_wherever_it_stands(before: dict[str, Any], data: dict[str, Any], after: dict[str, Any]) -> None:
    for fields in (before, after):
        fields.pop("data", None)
    for fields in (data,):
        fields.pop("sentiment", None)
    value = orjson.dumps(before | {"data": data} | {k: v for k, v in after.items() if k not in before})
    end = end_of_data(value)
    spliced = orjson.loads(value[:end] + b',"sentiment":1' + value[end:]) if data else {"data": {"sentiment": 1}}
    assert spliced["data"] == data | {"sentiment": 1}


def test_of_several_data_the_last_counts() -> None:
    value = rb'{"data":{"a":1},"x":["data",{"data":{}}],"d\u0061ta":{"text":"}"},"y":{}}'
    assert value[: end_of_data(value)].endswith(b'"}"')
