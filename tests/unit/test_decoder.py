"""Records in, events or the reasons why there are none out, as the documentation of records says."""

import sys
import unicodedata
from typing import Any, get_args

import orjson
import pytest

from tests.support.events import MARK, FakeRecord, decode
from worker.core.decoder import Decoder
from worker.core.empty_text import is_empty
from worker.core.events import Event, Failure, Headers, Null
from worker.core.json_input import MAX_VALUES
from worker.reasons import Reason


def test_where_the_text_is_depends_on_the_topic() -> None:
    decoder = Decoder(text_field="text", text_fields={"reviews": "data.body"})
    value = orjson.dumps({"text": "тут", "data": {"body": "там"}})
    found = [decoder.decode(FakeRecord(value, topic=topic)) for topic in ("texts", "reviews")]
    assert [event.text for event in found if isinstance(event, Event)] == ["тут", "там"]
    assert decoder.decode(FakeRecord(b"{}", topic="reviews")) == Failure(
        "decode", "missing_text", "the object has no field data.body"
    )


# --- Ids ---


def id_of(json_id: str, headers: Headers = (), **options: Any) -> str:
    event = decode('{"text": "да", "id": ' + json_id + "}", headers, **options)
    assert isinstance(event, Event)
    return event.id


@pytest.mark.parametrize(
    ("json_id", "id"),
    [
        ('"a-1"', "a-1"),
        ('""', ""),
        ('"007"', "007"),
        (r'"\u0416 \"\n"', 'Ж "\n'),
        ("0", "0"),
        ("42", "42"),
        ("-42", "-42"),
        ("-0", "-0"),
        (str(2**63), str(2**63)),
        (str(2**64), str(2**64)),
        (str(-(2**63) - 1), str(-(2**63) - 1)),
        ("123456789012345678901234567890", "123456789012345678901234567890"),
        ("-" + "9" * 300, "-" + "9" * 300),
    ],
)
def test_an_id_is_a_string_as_it_is_or_an_integer_by_its_own_digits(json_id: str, id: str) -> None:
    assert id_of(json_id, [("event.id", b"not this")]) == id


@pytest.mark.parametrize("digits", [310, 5_000])
def test_an_integer_larger_than_any_float_is_an_id_too(digits: int) -> None:
    assert id_of("9" * digits) == "9" * digits


@pytest.mark.parametrize(
    "json_id", ["1.5", "1.0", "1e3", "1e300", "true", "false", "null", "{}", '["x"]', '{"id": "x"}']
)
def test_an_id_of_another_type_comes_from_the_header_or_the_place(json_id: str) -> None:
    assert id_of(json_id, [("event.id", b"from header")]) == "from header"
    assert id_of(json_id) == "texts-3-1201"


@pytest.mark.parametrize(
    ("headers", "id"),
    [
        ([("event.id", "ж".encode())], "ж"),
        ([("event.id", b"1"), ("event.id", b"2")], "1"),
        ([("event.id", b"\xff")], "\ufffd"),
        ([("event.id", None)], "texts-3-1201"),
        ([("event.id", b"")], "texts-3-1201"),
        ([("Event.Id", b"1")], "texts-3-1201"),
        ([], "texts-3-1201"),
    ],
)
def test_without_an_id_of_its_own_the_header_names_the_event(headers: Headers, id: str) -> None:
    assert decode('{"text": "да"}', headers) == Event(id, "да")
    assert decode("да", headers, input_format="text") == Event(id, "да")


def test_dotted_paths_reach_inside() -> None:
    value = '{"payload": {"body": {"text": "да"}, "id": 123456789012345678901}, "text": "нет", "id": 1}'
    event = decode(value, text_field="payload.body.text", id_field="payload.id")
    assert event == Event("123456789012345678901", "да")


@pytest.mark.parametrize("value", ['{"payload": "text"}', '{"payload": [{"text": "да"}]}', '{"payload.text": "да"}'])
def test_a_dotted_path_that_leads_nowhere_is_a_missing_text(value: str) -> None:
    assert decode(value, text_field="payload.text") == Failure(
        "decode", "missing_text", "the object has no field payload.text"
    )


def test_a_plain_text_is_the_text_itself_white_space_and_all() -> None:
    assert decode(' {"text": "нет"}\n', [("event.id", b"7")], input_format="text") == Event("7", ' {"text": "нет"}\n')


# --- What cannot be scored ---

FAILURES: list[tuple[bytes, dict[str, Any], Reason]] = [
    (b"", {}, "invalid_json"),
    (b"{", {}, "invalid_json"),
    (b'\xef\xbb\xbf{"text": "a"}', {}, "invalid_json"),
    (b'\x00\x00\x00\x00\x07{"text": "a"}', {}, "invalid_json"),
    (b'\x00\x00\x01\x86\xa1{"text": "a"}', {}, "invalid_json"),
    (b"\x00\x00\x01\x86\xa1\x02\x04", {}, "invalid_utf8"),
    (b'{"text": "a",}', {}, "invalid_json"),
    (b'{"text": NaN}', {}, "invalid_json"),
    (rb'{"text": "\ud800"}', {}, "invalid_json"),
    (b'{"text": ' + b"[" * 90_000, {}, "invalid_json"),
    (b'{"text": "\xff"}', {}, "invalid_utf8"),
    (b'{"text": "\xed\xa0\x80"}', {}, "invalid_utf8"),
    ("да".encode("cp1251"), {"input_format": "text"}, "invalid_utf8"),
    (b"null", {}, "not_an_object"),
    (b'"text"', {}, "not_an_object"),
    (b'[{"text": "a"}]', {}, "not_an_object"),
    (b"{}", {}, "missing_text"),
    (b'{"Text": "a"}', {}, "missing_text"),
    (b'{"text": null}', {}, "text_not_string"),
    (b'{"text": 1}', {}, "text_not_string"),
    (b'{"text": ["a"]}', {}, "text_not_string"),
    (b'{"text": ""}', {}, "empty_text"),
    (rb'{"text": " \t\r\n\u00a0\u2003"}', {}, "empty_text"),
    (b"", {"input_format": "text"}, "empty_text"),
    (b" \n", {"input_format": "text"}, "empty_text"),
    (rb'{"text": "\u200b\u00ad\u0000\u202e\ufeff\u0301\u20dd\u3164 "}', {}, "empty_text"),
    (("\u200b" * 100_000).encode(), {"input_format": "text"}, "empty_text"),
    (b'{"text": "abcdef"}', {"max_text_chars": 5}, "too_large"),
    (b"abcdef", {"input_format": "text", "max_text_chars": 5}, "too_large"),
    (b'{"text": "a", "sentiment": null}', {"output_mode": "enrich"}, "field_exists"),
    (rb'{"text": "a", "\u0073entiment": 1}', {"output_mode": "enrich"}, "field_exists"),
]


@pytest.mark.parametrize(("value", "options", "reason"), FAILURES)
def test_a_record_that_cannot_be_read_says_why(value: bytes, options: dict[str, Any], reason: Reason) -> None:
    failure = decode(value, **options)
    assert isinstance(failure, Failure)
    assert (failure.stage, failure.reason) == ("decode", reason)
    assert failure.message
    assert "\n" not in failure.message


def test_a_text_is_empty_where_no_character_of_it_can_be_seen() -> None:
    for code in range(sys.maxunicode + 1):
        char = chr(code)
        category = unicodedata.category(char)
        invisible = char.isspace() or category in ("Cc", "Cf", "Mn", "Me") or char in "\u115f\u1160\u3164\uffa0"
        assert is_empty(char) is invisible, hex(code)
    assert is_empty("")


@pytest.mark.parametrize("seen", ["a", "я", "й", "漢", "👍", ".", "\ue000", "\u0903"])
def test_one_character_that_can_be_seen_makes_a_text(seen: str) -> None:
    for text in (f"\ufeff{seen}", f"{seen}\u0301", "\u200b" * 99_999 + seen, f" \n{seen}"):
        assert not is_empty(text)
        records = [FakeRecord(orjson.dumps({"text": each, "id": "1"})) for each in ("да", text, "нет")]
        assert [event.text for event in Decoder().decode_all(records) if isinstance(event, Event)] == [
            "да",
            text,
            "нет",
        ]


def test_an_empty_text_among_usual_ones_is_found() -> None:
    texts = ["да", "\u200b\u00ad", "нет", "\u0301"]
    records = [FakeRecord(orjson.dumps({"text": text, "id": "1"})) for text in texts]
    kinds = [found.reason if isinstance(found, Failure) else "" for found in Decoder().decode_all(records)]  # type: ignore[union-attr]
    assert kinds == ["", "empty_text", "", "empty_text"]


def test_every_decode_reason_has_an_example_here() -> None:
    later = {"inference_failed", "invalid_timestamp", "result_too_large", "key_required"}
    later |= {"invalid_cloudevent", "unknown_schema", "invalid_avro"}  # test_cloudevents.py, test_avro_input.py
    assert {reason for _, _, reason in FAILURES} == set(get_args(Reason)) - later


def test_a_text_of_the_largest_length_is_read_whatever_its_bytes() -> None:
    assert decode('{"text": "жжжжж"}', max_text_chars=5) == Event("texts-3-1201", "жжжжж")
    assert decode("\U0001f600" * 5, input_format="text", max_text_chars=5) == Event("texts-3-1201", "\U0001f600" * 5)


@pytest.mark.parametrize("value", ['{"text": "да", "sentiment": 1}', '{"text": "да", "inside": {"sentiment": 1}}'])
def test_only_enrich_refuses_a_field_named_sentiment_and_only_at_the_top(value: str) -> None:
    assert isinstance(decode(value), Event)
    assert isinstance(decode(value.replace('"sentiment": 1}', '"sentiments": 1}'), output_mode="enrich"), Event)


@pytest.mark.parametrize("number", ["1e999", "9" * 310, "-1e400"])
def test_a_number_larger_than_any_float_is_json_too(number: str) -> None:
    assert decode('{"text": "да", "id": "1", "n": ' + number + "}") == Event("1", "да")


STRUCTURED = [("content-type", b"application/cloudevents+json")]
CLOUD_EVENT = '{"specversion":"1.0","id":"1","source":"s","type":"t",'
NULL_TEXTS: list[tuple[str, str, Headers, Reason]] = [
    ('{"text": null}', "text", (), "text_not_string"),
    ('{"after": null, "op": "d"}', "after.text", (), "missing_text"),
    ('{"payload": {"after": null}}', "payload.after.text", (), "missing_text"),
    ('{"after": {"text": null}}', "after.text", (), "text_not_string"),
    (CLOUD_EVENT + '"data":{"after":null}}', "after.text", STRUCTURED, "missing_text"),
    (CLOUD_EVENT + '"data":null}', "text", STRUCTURED, "not_an_object"),
    (CLOUD_EVENT + '"datacontenttype":"text/plain","data":null}', "text", STRUCTURED, "text_not_string"),
]
NO_NULL_TEXTS: list[tuple[str, str, Reason]] = [
    ("{}", "text", "missing_text"),
    ('{"before": null}', "after.text", "missing_text"),
    ('{"after": {}}', "after.text", "missing_text"),
    ('{"after": {"text": 0}}', "after.text", "text_not_string"),
    ('{"after": ""}', "after.text", "missing_text"),
    ('{"text": "null"}', "text.x", "missing_text"),
    ("null", "text", "not_an_object"),
]


@pytest.mark.parametrize(("value", "text_field", "headers", "reason"), NULL_TEXTS)
def test_a_null_text_is_a_dead_letter_or_skipped(value: str, text_field: str, headers: Headers, reason: Reason) -> None:
    dead = decode(value, headers, text_field=text_field)
    assert isinstance(dead, Failure)
    assert dead.reason == reason
    decoder = Decoder(text_field=text_field, on_null_text="skip")
    plain = FakeRecord(b'{"id": "1", "text": "x", "after": {"text": "x"}, "payload": {"after": {"text": "x"}}}')
    assert decoder.decode_all([FakeRecord(value.encode(), headers=headers), plain]) == [Null.SKIPPED, Event("1", "x")]


@pytest.mark.parametrize(("value", "text_field", "reason"), NO_NULL_TEXTS)
def test_what_is_no_null_text_stays_a_dead_letter(value: str, text_field: str, reason: Reason) -> None:
    for setting in ("dead_letter", "skip"):
        failure = decode(value, text_field=text_field, on_null_text=setting)
        assert isinstance(failure, Failure)
        assert failure.reason == reason


@pytest.mark.parametrize("input_format", ["json", "text"])
def test_a_null_is_a_tombstone_with_a_key_and_skipped_without(input_format: str) -> None:
    assert decode(None, key=b"k", input_format=input_format) is Null.TOMBSTONE
    assert decode(None, key=b"", input_format=input_format) is Null.TOMBSTONE
    assert decode(None, key=None, input_format=input_format) is Null.SKIPPED


@pytest.mark.parametrize(("value", "options", "reason"), FAILURES)
def test_no_message_quotes_the_value(value: bytes, options: dict[str, Any], reason: Reason) -> None:
    marked = value.replace(b"a", MARK.encode())
    failure = decode(marked, **options)
    assert isinstance(failure, Failure)
    assert not set(MARK) & set(failure.message)


@pytest.mark.parametrize(
    ("value", "id"),
    [(b'{"id":7,"text":5}', "7"), (b"{", "texts-3-1201"), (b"[1]", "texts-3-1201"), (None, "texts-3-1201")],
)
def test_an_event_has_an_id_whatever_else_is_wrong(value: bytes | None, id: str) -> None:
    assert Decoder().id_of(FakeRecord(value)) == id


def test_a_text_is_not_json_and_may_have_any_commas() -> None:
    text = "," * (MAX_VALUES + 1)
    assert isinstance(decode(text, input_format="text", max_text_chars=10**6), Event)


@pytest.mark.parametrize(
    "options", [{}, {"output_mode": "enrich"}, {"text_field": "a.b", "id_field": "a.id"}, {"input_format": "text"}]
)
@pytest.mark.parametrize(
    "strange",
    [
        None,
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"id": 7}',
        b'{"text": "\xd0\xb4\xd0\xb0"}',
        b'{"text": " ", "id": 1}',
        b'{"text": "", "id": 1}',
        b'{"text": 5, "id": 1}',
        b'{"text": "123456789", "id": 1}',
        b'{"text": "1", "id": -0}',
        b'{"text": "1", "id": 18446744073709551617}',
        b'{"text": "1", "id": 9223372036854775808}',
        b'{"text": "1", "id": true}',
        b'{"text": "1", "id": 1.5}',
        b'{"text": "1", "id": null}',
        b'{"text": "1", "id": "x"}',
        b'{"text": "1", "id": 1, "sentiment": 1}',
        b'{"a": {"b": "1"}, "id": 1}',
        b'{"a": {"b": "1", "id": 3}}',
        b'{"text": "1", "id": 1, "n": 1e999}',
        b'{"text": "1", "id": 1, "n": [%b1]}' % (b"1," * MAX_VALUES),
    ],
)
def test_records_decoded_together_are_what_each_is_alone(strange: bytes | None, options: dict[str, Any]) -> None:
    """The strange one stands in the second run, among usual ones; the first and the third have none."""
    usual = b'{"text": "1234", "id": 41, "a": {"b": "12", "id": "x"}}'
    records = [FakeRecord(usual, offset=offset) for offset in range(300)]
    records[200] = FakeRecord(strange, offset=200)
    decoder = Decoder(max_text_chars=8 if options.get("input_format") != "text" else 100, **options)
    assert decoder.decode_all(records) == list(map(decoder.decode, records))
