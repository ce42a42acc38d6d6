"""Avro and JSON in Confluent's framing: records in, events or reasons out."""

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.avro import REVIEW, number, record, review, string
from tests.support.events import CARD, MODEL, PROCESSED_AT, FakeRecord
from worker.core.decoder import RUN, Decoder
from worker.core.encoder import Encoder
from worker.core.events import Event, Failure, Headers, Null, Outgoing
from worker.core.framing import frame

AVRO = (("ce_specversion", b"1.0"), ("ce_id", b"e-1"), ("ce_source", b"/a"), ("ce_type", b"t"))
NEWER = record("Review", text="string", id="string", language="string")


def decoder(*schemas: object, **options: Any) -> Decoder:
    """One that knows these schemas, by the ids 1, 2 and so on."""
    made = Decoder(**{"input_format": "avro", **options})
    for id, schema in enumerate(schemas, 1):
        made.schemas.add(id, "AVRO", schema if isinstance(schema, str) else json.dumps(schema), [])
    return made


def reason(decoded: object) -> str:
    assert isinstance(decoded, Failure), decoded
    assert decoded.stage == "decode"
    return decoded.reason


def test_each_record_is_read_by_its_own_schema() -> None:
    values = [
        frame(1) + review(7, "да"),
        frame(2) + string("нет") + string("a-1") + string("ru"),
        frame(1) + review(-8, "или"),
    ]
    records = [FakeRecord(value) for value in values]
    events = [Event("7", "да"), Event("a-1", "нет"), Event("-8", "или")]
    assert decoder(REVIEW, NEWER).decode_all(records) == events
    assert [decoder(REVIEW, NEWER).decode(record) for record in records] == events


def test_text_and_id_are_found_through_records_unions_and_maps() -> None:
    schema = record(
        "Outer", payload=["null", record("Inner", texts={"type": "map", "values": "string"}, key=["null", "long"])]
    )
    value = (
        b"\x02" + number(2) + string("en") + string("no") + string("ru") + string("да") + b"\0" + b"\x02" + number(5)
    )
    read = decoder(schema, text_field="payload.texts.ru", id_field="payload.key")
    assert read.decode(FakeRecord(frame(1) + value)) == Event("5", "да")


@pytest.mark.parametrize(
    ("schema", "value", "expected"),
    [
        (REVIEW, b"", "invalid_avro"),
        (REVIEW, review(1, "да")[:-1], "invalid_avro"),
        (REVIEW, review(1, "да") + b"\0", "invalid_avro"),
        (REVIEW, review(1, None), "text_not_string"),
        (REVIEW, review(1, " \n"), "empty_text"),
        (REVIEW, review(1, "да" * 11), "too_large"),
        (record("R", other="string"), string("да"), "missing_text"),
        (record("R", text="bytes"), string("да"), "text_not_string"),
        (record("R", text=record("Inner", a="int")), b"\0", "text_not_string"),
        ("string", string("да"), "not_an_object"),
        (["null", REVIEW], b"\0", "not_an_object"),
        ("{", review(1, "да"), "unknown_schema"),
        (
            record("R", text="string", more={"type": "array", "items": "R"}),
            b"\0" + b"\x02\0" * 9000 + b"\0",
            "too_large",
        ),
    ],
)
def test_what_holds_no_text_becomes_a_dead_letter(schema: Any, value: bytes, expected: str) -> None:
    found = decoder(schema if schema == "{" else json.dumps(schema), max_text_chars=20).decode(
        FakeRecord(frame(1) + value)
    )
    assert reason(found) == expected


@pytest.mark.parametrize("value", [b"", b"\0", b"\0\0\0\0", b"\1" + frame(1)[1:] + review(1, "да"), b'{"text": "OK"}'])
def test_a_value_without_the_framing_is_no_avro(value: bytes) -> None:
    assert reason(decoder(REVIEW).decode(FakeRecord(value))) == "invalid_avro"


def test_a_schema_that_is_missing_or_of_another_kind_is_told_by_its_id() -> None:
    read = decoder(REVIEW)
    read.schemas.add(2, "PROTOBUF", 'syntax = "proto3";', [])
    for id, said in ((2, "PROTOBUF"), (3, "no schema with the id 3")):
        found = read.decode(FakeRecord(frame(id) + review(1, "да")))
        assert reason(found) == "unknown_schema"
        assert isinstance(found, Failure)
        assert said in found.message


def test_the_schemas_to_fetch_are_those_that_are_not_known_and_may_exist() -> None:
    read = decoder(REVIEW, input_formats={"plain": "text", "objects": "json"})
    values = [frame(1) + b"x", frame(2) + b"x", frame(2), frame(2**31) + b"x", b"\1\0\0\0\7x", None, b"", b"\0\0\0\0"]
    assert read.missing_schemas([FakeRecord(value) for value in values]) == {2}
    assert read.missing_schemas([]) == set()
    for topic in ("plain", "objects"):
        assert read.missing_schemas([FakeRecord(frame(9) + b"x", topic=topic)]) == set()


def test_the_format_depends_on_the_topic() -> None:
    read = decoder(REVIEW, input_formats={"plain": "text", "objects": "json"})
    values = {
        "texts": frame(1) + review(7, "да"),
        "plain": "да".encode(),
        "objects": '{"id": 7, "text": "да"}'.encode(),
    }
    for topic, value in values.items():
        event = read.decode(FakeRecord(value, topic=topic))
        assert isinstance(event, Event)
        assert event.text == "да"
        assert read.decode_all([FakeRecord(value, topic=topic)]) == [event]
        assert read.id_of(FakeRecord(value, topic=topic)) == event.id


def test_an_id_that_is_no_string_and_no_integer_is_taken_from_the_record() -> None:
    read = decoder(record("R", id="double", text="string"))
    value = frame(1) + b"\0" * 8 + string("да")
    assert read.decode(FakeRecord(value)) == Event("texts-3-1201", "да")
    assert read.decode(FakeRecord(value, headers=[("event.id", b"h")])) == Event("h", "да")


@pytest.mark.parametrize("id", [0, -(2**63), 2**63 - 1])
def test_an_integer_is_an_id_by_its_digits(id: int) -> None:
    assert decoder(REVIEW).decode(FakeRecord(frame(1) + review(id, "-0"))) == Event(str(id), "-0")


def test_nulls_are_as_with_json() -> None:
    assert decoder(REVIEW).decode(FakeRecord(None)) is Null.TOMBSTONE
    assert decoder(REVIEW, on_null_text="skip").decode(FakeRecord(frame(1) + review(1, None))) is Null.SKIPPED


@given(st.lists(st.sampled_from([1, 2, 3, 4, 5]), max_size=2 * RUN + 3), st.data())
def test_records_together_are_decoded_as_each_alone(kinds: list[int], data: st.DataObject) -> None:
    """Whatever mixture: two schemas, one that is unknown, bytes that fit none, nulls."""
    of_kind = {
        1: frame(1) + review(3, "да"), 2: frame(2) + string("нет") + string("a") + string("ru"),
        3: frame(3) + review(3, "да"), 4: frame(1) + b"\xff", 5: None,
    }  # fmt: skip
    rare = data.draw(st.booleans())
    values = [of_kind[1 if rare and kind > 2 and at % RUN else kind] for at, kind in enumerate(kinds)]
    records = [FakeRecord(value, offset=at) for at, value in enumerate(values)]
    read = decoder(REVIEW, NEWER)
    assert read.decode_all(records) == [read.decode(record) for record in records]


@given(st.binary(max_size=60), st.booleans())
def test_any_bytes_are_decoded_without_an_error(value: bytes, is_framed: bool) -> None:
    read = decoder(REVIEW, NEWER)
    decoded = read.decode(FakeRecord(frame(1) + value if is_framed else value))
    if isinstance(decoded, Failure):
        assert decoded.message.isascii()
    assert isinstance(read.id_of(FakeRecord(value)), str)


@pytest.mark.parametrize("type", [None, b"application/avro", b"application/vnd.acme.review+avro", b"avro/binary"])
def test_the_data_of_a_binary_cloud_event_is_avro_where_its_type_says_so_or_nothing(type: bytes | None) -> None:
    headers: Headers = [*AVRO, *([("content-type", type)] if type else [])]
    assert decoder(REVIEW).decode(FakeRecord(frame(1) + review(7, "да"), headers=headers)) == Event("e-1", "да")


def test_a_cloud_event_of_another_type_is_read_by_it_and_a_structured_one_is_json() -> None:
    headers = [*AVRO, ("content-type", b"application/json")]
    assert decoder(REVIEW).decode(FakeRecord('{"text": "да"}'.encode(), headers=headers)) == Event("e-1", "да")
    event = {"specversion": "1.0", "id": "e-2", "source": "/a", "type": "t", "datacontenttype": "application/avro"}
    structured = [("content-type", b"application/cloudevents+json")]
    value = orjson.dumps({**event, "data_base64": "AAAAAAE="})
    assert reason(decoder(REVIEW).decode(FakeRecord(value, headers=structured))) == "invalid_cloudevent"
    with_type = [*AVRO, ("content-type", b"application/avro")]
    found = decoder(REVIEW, input_format="json").decode(FakeRecord(frame(1) + review(7, "да"), headers=with_type))
    assert reason(found) == "invalid_cloudevent"


# --- JSON in the framing ---

JSON = '{"id": 18446744073709551616, "text": "да"}'.encode()


@pytest.mark.parametrize("value", [JSON, frame(7) + JSON])
def test_json_may_stand_in_the_framing_where_a_registry_is_configured(value: bytes) -> None:
    read = Decoder(reads_frames=True)
    event = Event("18446744073709551616", "да")
    assert read.decode(FakeRecord(value)) == event
    assert read.decode_all([FakeRecord(value)] * 3) == [event] * 3
    assert read.id_of(FakeRecord(value)) == event.id
    usual = value.replace(b"18446744073709551616", b"5")
    assert read.decode_all([FakeRecord(usual)] * 3) == [Event("5", "да")] * 3
    headers = [*AVRO, ("content-type", b"application/json")]
    assert read.decode(FakeRecord(value, headers=headers)) == Event("e-1", "да")


def test_without_a_registry_the_framing_is_no_json() -> None:
    found = Decoder().decode(FakeRecord(frame(7) + JSON))
    assert reason(found) == "invalid_json"


def test_what_is_enriched_loses_the_frame_whose_schema_does_not_have_the_field() -> None:
    value = '{"id": "42", "text": "да"}'.encode()
    encoder = Encoder(output_mode="enrich", reads_frames=True)
    records = [FakeRecord(value), FakeRecord(frame(7) + value)]
    results = encoder.encode(records, [Event("42", "да")] * 2, [CARD] * 2, [False] * 2, MODEL, PROCESSED_AT)
    plain, framed = (result.value for result in results if isinstance(result, Outgoing))
    assert plain == framed
    assert framed is not None
    assert orjson.loads(framed)["sentiment"]["label"] == "negative"
