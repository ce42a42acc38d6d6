"""Records in, results and dead letters out, byte for byte as the README's section on records says."""

import json
import sys
import unicodedata
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.payloads import PAYLOADS
from worker.core.dead_letters import dead_letter, read_dead_letter, record_to_replay, smaller_dead_letters
from worker.core.decoder import Decoder
from worker.core.empty_text import is_empty
from worker.core.encoder import Encoder, result_fields
from worker.core.events import Decoded, Event, Failure, Headers, Null, Outgoing, Reason
from worker.core.json_input import MAX_VALUES
from worker.core.sentiment import LABELS, Sentiment
from worker.core.timestamps import age_s, iso_time, timestamp_ms

CARD = Sentiment("negative", -0.58949463, (0.7870447, 0.4947824, 0.19755007))
MODEL = "cointegrated/rubert-tiny-sentiment-balanced@0123456789ab"
TEN = 1_795_428_000_000  # 2026-11-23T10:00:00.000Z
PROCESSED_AT = "2026-11-23T10:00:00.021Z"
AFTER_YEAR_9999 = 253_402_300_800_000


@dataclass(frozen=True)
class FakeRecord:
    value: bytes | None
    key: bytes | None = b"k"
    headers: Headers = ()
    timestamp: int = TEN
    topic: str = "texts"
    partition: int = 3
    offset: int = 1201


def decode(value: bytes | str | None, headers: Headers = (), key: bytes | None = b"k", **options: Any) -> Decoded:
    value = value.encode() if isinstance(value, str) else value
    return Decoder(**options).decode(FakeRecord(value, key=key, headers=headers))


def id_of(json_id: str, headers: Headers = (), **options: Any) -> str:
    event = decode('{"text": "да", "id": ' + json_id + "}", headers, **options)
    assert isinstance(event, Event)
    return event.id


def encode(record: FakeRecord, event: Event, output_mode: str = "result", truncated: bool = False) -> Outgoing:
    [outgoing] = Encoder(output_mode=output_mode).encode([record], [event], [CARD], [truncated], MODEL, PROCESSED_AT)
    assert isinstance(outgoing, Outgoing)
    return outgoing


def enriched(value: bytes) -> bytes:
    record = FakeRecord(value)
    event = Decoder(output_mode="enrich").decode(record)
    assert isinstance(event, Event)
    published = encode(record, event, "enrich").value
    assert published is not None
    return published


RESULT = (
    b'{"id":"42","label":"negative","score":-0.589495,'
    b'"probabilities":{"negative":0.787045,"neutral":0.494782,"positive":0.19755},'
    b'"truncated":false,"model":"cointegrated/rubert-tiny-sentiment-balanced@0123456789ab",'
    b'"source":{"topic":"texts","partition":3,"offset":1201},"event_time":"2026-11-23T10:00:00.000Z",'
    b'"processed_at":"2026-11-23T10:00:00.021Z"}'
)


# --- From record to result ---


def test_a_record_becomes_the_result_of_the_contract_byte_for_byte() -> None:
    record = FakeRecord('{"id": 42, "text": "Какая гадость эта ваша заливная рыба!"}'.encode())
    event = Decoder().decode(record)
    assert event == Event("42", "Какая гадость эта ваша заливная рыба!")
    outgoing = encode(record, event)
    assert outgoing == Outgoing(b"k", RESULT, [("content-type", b"application/json")], TEN)


def test_where_the_text_is_depends_on_the_topic() -> None:
    decoder = Decoder(text_field="text", text_fields={"reviews": "data.body"})
    value = orjson.dumps({"text": "тут", "data": {"body": "там"}})
    found = [decoder.decode(FakeRecord(value, topic=topic)) for topic in ("texts", "reviews")]
    assert [event.text for event in found if isinstance(event, Event)] == ["тут", "там"]
    assert decoder.decode(FakeRecord(b"{}", topic="reviews")) == Failure(
        "decode", "missing_text", "the object has no field data.body"
    )


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


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [
        (0, "1970-01-01T00:00:00.000Z"),
        (1_795_428_000_021, "2026-11-23T10:00:00.021Z"),
        (1_795_428_000_021.9, "2026-11-23T10:00:00.021Z"),
        (AFTER_YEAR_9999 - 1, "9999-12-31T23:59:59.999Z"),
    ],
)
def test_times_have_milliseconds_in_utc(milliseconds: float, text: str) -> None:
    assert iso_time(milliseconds) == text


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


def test_a_header_that_only_begins_like_it_is_kept() -> None:
    outgoing = encode(FakeRecord(b"", headers=[("content-type-2", b"x")]), Event("42", "да"))
    assert outgoing.headers[0] == ("content-type-2", b"x")


def test_a_null_key_stays_null() -> None:
    assert encode(FakeRecord(b"", key=None), Event("42", "да")).key is None


# --- Ids ---


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
    later.add("invalid_cloudevent")  # test_cloudevents.py
    assert {reason for _, _, reason in FAILURES} == set(get_args(Reason)) - later


def test_a_text_of_the_largest_length_is_read_whatever_its_bytes() -> None:
    assert decode('{"text": "жжжжж"}', max_text_chars=5) == Event("texts-3-1201", "жжжжж")
    assert decode("\U0001f600" * 5, input_format="text", max_text_chars=5) == Event("texts-3-1201", "\U0001f600" * 5)


@pytest.mark.parametrize("value", ['{"text": "да", "sentiment": 1}', '{"text": "да", "inside": {"sentiment": 1}}'])
def test_a_field_of_that_name_is_in_nobodys_way_elsewhere(value: str) -> None:
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


def test_a_tombstone_goes_on_as_it_is() -> None:
    headers = [("content-type", b"text/plain"), ("x", None)]
    record = FakeRecord(None, headers=tuple(headers))
    assert Encoder().tombstone(record) == Outgoing(b"k", None, headers, TEN)
    assert Encoder().tombstone(replace(record, timestamp=-1)).timestamp is None
    assert isinstance(Encoder().tombstone(record).headers, list)


# --- Enriched ---

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


# --- Dead letters ---

FAILURE = Failure("decode", "too_large", "the text has 6 characters, more than 5")
ERRORS = [
    ("error.stage", b"decode"),
    ("error.reason", b"too_large"),
    ("error.message", b"the text has 6 characters, more than 5"),
    ("source.topic", b"texts"),
    ("source.partition", b"3"),
    ("source.offset", b"1201"),
    ("source.timestamp", b"1795428000000"),
    ("worker.version", b"0.1.0"),
]
ORIGINAL = [("content-type", b"text/plain"), ("x", b"1"), ("x", None)]
REFUSED = FakeRecord(b'\xff{"text"', headers=ORIGINAL)


def test_a_dead_letter_is_the_record_untouched_with_all_that_is_known_of_its_end() -> None:
    letter = dead_letter(REFUSED, FAILURE, "0.1.0")
    assert letter == Outgoing(b"k", b'\xff{"text"', [*ORIGINAL, *ERRORS], None)
    assert isinstance(letter.headers, list)


def test_a_dead_letter_of_a_record_without_a_timestamp_says_minus_one() -> None:
    assert dict(dead_letter(replace(REFUSED, timestamp=-1), FAILURE, "0.1.0").headers)["source.timestamp"] == b"-1"


def test_a_refused_dead_letter_shrinks_to_empty_bytes_then_loses_the_inputs_headers() -> None:
    first, second = smaller_dead_letters(REFUSED, FAILURE, "0.1.0")
    size = ("error.value_bytes", b"8")
    assert first == Outgoing(b"k", b"", [*ORIGINAL, *ERRORS, size], None)
    assert second == Outgoing(b"k", b"", [*ERRORS, size], None)


# --- Anything at all ---

MARK = "ZQжщ"  # begins a text, and is in no message of the worker's


def json_values() -> st.SearchStrategy[Any]:
    texts = st.text(max_size=8).map(lambda text: MARK + text)
    leaves = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8) | texts
    names = st.sampled_from(["text", "id", "sentiment", "payload", "", "a"]) | texts
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4), max_leaves=6
    )


def objects() -> st.SearchStrategy[dict[str, Any]]:
    """Objects that are nearly events: these reach furthest into the code."""
    texts = st.text(max_size=20).map(lambda text: MARK + text)
    return st.fixed_dictionaries(
        {}, optional={"text": texts | json_values(), "id": json_values(), "sentiment": texts, "a": json_values()}
    )


def written(value: Any) -> bytes:
    """JSON as others write it: with NaN, and with halves of surrogate pairs, escaped or not even UTF-8."""
    return json.dumps(value, ensure_ascii=False).encode(errors="surrogatepass")


VALUES = st.one_of(
    objects().map(written),
    objects().map(lambda value: json.dumps(value).encode()),
    json_values().map(written),
    st.builds(lambda value, cut: written(value)[:cut], objects(), st.integers(0, 60)),
    st.binary(max_size=60),
    st.binary(max_size=20).map(lambda noise: b'{"text": "' + MARK.encode() + noise + b'"}'),
    st.none(),
)
DECODERS = {
    "result": Decoder(max_text_chars=20),
    "enrich": Decoder(max_text_chars=20, output_mode="enrich"),
    "inside": Decoder(text_field="a.text", id_field="a.id"),
    "text": Decoder(max_text_chars=20, input_format="text"),
}


@dataclass
class Seen:
    kinds: dict[str, set[str]] = field(default_factory=dict)
    payloads: int = 0

    def add(self, name: str, decoded: Decoded) -> None:
        kind = decoded.reason if isinstance(decoded, Failure) else type(decoded).__name__
        self.kinds.setdefault(name, set()).add(kind)


def check_event(name: str, record: FakeRecord, event: Event) -> None:
    assert event.text.strip()
    outgoing = encode(record, event, "enrich" if name == "enrich" else "result")
    assert outgoing.value is not None
    result = json.loads(outgoing.value)
    assert (result["sentiment"] if name == "enrich" else result)["id"] == event.id


def check(name: str, record: FakeRecord) -> Decoded:
    decoded = DECODERS[name].decode(record)
    assert isinstance(decoded, Event | Failure | Null)
    if isinstance(decoded, Event):
        check_event(name, record, decoded)
    elif isinstance(decoded, Failure):
        assert not set(MARK) & set(decoded.message)
        assert decoded.message.isascii()
        assert dead_letter(record, decoded, "0.1.0").value == record.value
    else:
        assert record.value is None
    return decoded


def test_hostile_payloads_never_raise_and_no_message_has_any_of_their_text() -> None:
    seen = Seen()

    @settings(
        max_examples=PAYLOADS, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(VALUES, st.none() | st.binary(max_size=4))
    def run(value: bytes | None, key: bytes | None) -> None:
        seen.payloads += 1
        for name in DECODERS:
            seen.add(name, check(name, FakeRecord(value, key=key)))

    run()
    assert seen.payloads >= PAYLOADS
    assert {"Event", "Null", "invalid_json"} <= set(seen.kinds["enrich"])
    assert {"Event", "Null", "invalid_utf8"} <= set(seen.kinds["text"])


@pytest.mark.parametrize(("value", "options", "reason"), FAILURES)
def test_no_message_quotes_the_value(value: bytes, options: dict[str, Any], reason: Reason) -> None:
    marked = value.replace(b"a", MARK.encode())
    failure = decode(marked, **options)
    assert isinstance(failure, Failure)
    assert not set(MARK) & set(failure.message)


@settings(max_examples=300, deadline=None)
@given(objects(), st.sampled_from(["", " ", "\n", " \r\n\t"]), st.sampled_from([None, 0, 2]))
def test_any_object_that_is_enriched_reads_as_before_with_one_field_more(
    fields: dict[str, Any], space: str, indent: int | None
) -> None:
    value = (json.dumps(fields, indent=indent) + space).encode()
    record = FakeRecord(value)
    event = DECODERS["enrich"].decode(record)
    if isinstance(event, Event):
        published = encode(record, event, "enrich").value
        assert published is not None
        assert published.startswith(value[: value.rindex(b"}")])
        sentiment = json.loads(published).pop("sentiment")
        assert sentiment["label"] == "negative"
        without = published.replace(b',"sentiment":' + orjson.dumps(sentiment), b"")
        assert without == value


# --- Dead letters back to records ---


def as_letter(outgoing: Outgoing) -> FakeRecord:
    return FakeRecord(outgoing.value, outgoing.key, outgoing.headers, TEN + 5, "dead", 0, 7)


@pytest.mark.parametrize("timestamp", [TEN, 0, -1, 2**63 - 1])
def test_a_dead_letter_gives_its_record_back(timestamp: int) -> None:
    own = [("trace", b"1"), ("error.stage", b"the input's"), ("source.topic", None), ("event.id", b"me")]
    record = FakeRecord(b"{", b"k", own, timestamp)
    found = read_dead_letter(as_letter(dead_letter(record, FAILURE, "1.0")))
    assert found is not None
    assert found == (record.topic, 3, 1201, timestamp, b"k", b"{", own, "too_large", True)
    outgoing = record_to_replay(found, Decoder().id_of(found))
    assert outgoing.timestamp is None, "with its own, retention would delete it"
    first = [("event.timestamp", b"%d" % timestamp)] if timestamp >= 0 else []
    assert outgoing.headers == [*own[:3], ("event.id", b"me"), ("replay.count", b"1"), *first]
    assert (outgoing.key, outgoing.value) == (b"k", b"{")


NOT_A_MOMENT = (None, b"", b"x", b"-1", b"1.5", b" 1", b"1_0", "١".encode(), b"%d" % AFTER_YEAR_9999, b"9" * 100_000)


@pytest.mark.parametrize("before", [b"0", b"1700000000000", b"%d" % (AFTER_YEAR_9999 - 1)])
def test_a_second_replay_keeps_the_first_timestamp(before: bytes) -> None:
    record = FakeRecord(b"{", headers=[("event.timestamp", before), ("h", b"1")])
    found = read_dead_letter(as_letter(dead_letter(record, FAILURE, "1.0")))
    assert found is not None
    assert [value for name, value in record_to_replay(found, "1").headers if name == "event.timestamp"] == [before]


@pytest.mark.parametrize("before", NOT_A_MOMENT)
def test_what_is_no_timestamp_does_not_keep_the_first_one_away(before: bytes | None) -> None:
    record = FakeRecord(b"{", headers=[("event.timestamp", before)])
    found = read_dead_letter(as_letter(dead_letter(record, FAILURE, "1.0")))
    assert found is not None
    kept = [value for name, value in record_to_replay(found, "1").headers if name == "event.timestamp"]
    assert kept == [before, b"%d" % TEN]


@pytest.mark.parametrize("output_mode", ["result", "enrich"])
@pytest.mark.parametrize(
    ("told", "time"),
    [(b"0", "1970-01-01T00:00:00.000Z"), (b"253402300799999", "9999-12-31T23:59:59.999Z")]
    + [(told, "2026-11-23T10:00:00.000Z") for told in NOT_A_MOMENT],
)
def test_the_first_timestamp_is_the_events_and_not_the_results(told: bytes | None, time: str, output_mode: str) -> None:
    record = FakeRecord(b'{"text": "x"}', headers=[("event.timestamp", told), ("other", b"1")])
    plain = FakeRecord(b'{"text": "x"}')
    encoder = Encoder(output_mode=output_mode)
    results = encoder.encode([record, plain], [Event("1", "x")] * 2, [CARD] * 2, [False] * 2, MODEL, PROCESSED_AT)
    for outgoing, expected in zip(results, (time, "2026-11-23T10:00:00.000Z"), strict=True):
        assert isinstance(outgoing, Outgoing)
        fields = orjson.loads(outgoing.value or b"")
        assert fields.get("sentiment", fields)["event_time"] == expected
        assert outgoing.timestamp == TEN


def test_a_record_without_a_timestamp_may_have_its_first_one() -> None:
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


LATER_REASONS = ("unknown_schema", "invalid_avro", "key_required", "invalid_utf16", "http_503", "3d")


@pytest.mark.parametrize("reason", [*get_args(Reason), *LATER_REASONS])
def test_a_dead_letter_of_every_reason_is_one(reason: Reason) -> None:
    found = read_dead_letter(as_letter(dead_letter(FakeRecord(b"{"), FAILURE._replace(reason=reason), "1.0")))
    assert found is not None
    assert found.reason == reason


NOW_S = TEN / 1000
YEAR_S = 365 * 86_400


@pytest.mark.parametrize(
    ("timestamp", "age"),
    [
        (TEN, 0.0), (TEN - 1_500, 1.5), (TEN + 900, 0.0), (TEN - 1000 * YEAR_S, YEAR_S),
        (TEN - 1000 * YEAR_S - 1, None), (TEN // 1000, None), (TEN * 1000, None), (TEN + 1_001, None), (0, None),
        (-1, None), (None, None),
    ],
)  # fmt: skip
def test_a_timestamp_that_cannot_be_right_says_nothing_about_an_age(timestamp: int | None, age: float | None) -> None:
    assert age_s(timestamp, NOW_S) == age


def test_headers_that_others_have_added_behind_are_kept() -> None:
    letter = dead_letter(FakeRecord(b"{"), FAILURE, "1.0")
    letter.headers.append(("mirrored.by", b"x"))
    found = read_dead_letter(as_letter(letter))
    assert found is not None
    assert found.headers == [("mirrored.by", b"x")]


@pytest.mark.parametrize(("before", "after"), [(b"1", b"2"), (b"41", b"42"), (b"x", b"1"), (None, b"1")])
def test_a_replay_counts_on(before: bytes | None, after: bytes) -> None:
    found = read_dead_letter(
        as_letter(dead_letter(FakeRecord(b"{", headers=[("replay.count", before)]), FAILURE, "1.0"))
    )
    assert found is not None
    assert record_to_replay(found, "1").headers[:2] == [("event.id", b"1"), ("replay.count", after)]


@pytest.mark.parametrize("smaller", [0, 1])
def test_a_value_that_was_not_kept_is_known(smaller: int) -> None:
    found = read_dead_letter(as_letter(smaller_dead_letters(FakeRecord(b"{"), FAILURE, "1.0")[smaller]))
    assert found is not None
    assert not found.is_whole


@pytest.mark.parametrize(
    "headers", [[], [("error.stage", b"decode")], [("error.stage", b"x"), ("source.offset", b"y")]]
)
def test_what_is_no_dead_letter_is_known(headers: Headers) -> None:
    assert read_dead_letter(FakeRecord(b"{}", headers=headers)) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("source.topic", b""), ("source.topic", b".."), ("source.topic", b"a b"), ("source.topic", "тема".encode()),
        ("source.partition", b"-1"), ("source.partition", b"4294967296"), ("source.offset", b"-1"),
        ("source.timestamp", b"9" * 19), ("source.timestamp", b"9" * 30), ("source.timestamp", b"-2"),
        ("source.partition", b"1_0"),
        ("error.reason", b"[/bold]"), ("error.reason", b"\x1b]0;owned\x07"), ("error.reason", b""),
    ],
)  # fmt: skip
def test_a_dead_letter_that_the_worker_never_wrote_is_none(name: str, value: bytes) -> None:
    """Believed, such a number would end the replay, each time anew, and such a reason its table."""
    letter = dead_letter(FakeRecord(b"{"), FAILURE, "1.0")
    assert read_dead_letter(as_letter(letter)) is not None
    letter = letter._replace(headers=[(own, value if own == name else said) for own, said in letter.headers])
    assert read_dead_letter(as_letter(letter)) is None


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (b'\xef\xbb\xbf{"text": "a"}', "it begins with a byte order mark"),
        (
            b'\x00\x00\x00\x00\x07{"text": "a"}',
            "it begins with Confluent's framing, a zero byte and the id of a schema (7)",
        ),
        (b'\x00\x00\x01\x86\xa1 {"text": "a"}', "the id of a schema (100001)"),
        (b"\x00\x00\x01\x86\xa1\x02\x04", "the id of a schema (100001)"),
    ],
)
def test_what_a_producer_has_put_in_front_of_the_json_is_named(value: bytes, words: str) -> None:
    for mode in ({}, {"output_mode": "enrich"}):
        failure = decode(value, **mode)
        assert isinstance(failure, Failure)
        assert words in failure.message


def test_framed_json_that_is_no_utf_8_is_told_where() -> None:
    failure = decode(b'\x00\x00\x00\x00\xff{"text": "\xff"}')
    assert failure == Failure("decode", "invalid_utf8", failure.message)
    assert "at byte 15:" in failure.message


@pytest.mark.parametrize(
    ("value", "id"),
    [(b'{"id":7,"text":5}', "7"), (b"{", "texts-3-1201"), (b"[1]", "texts-3-1201"), (None, "texts-3-1201")],
)
def test_an_event_has_an_id_whatever_else_is_wrong(value: bytes | None, id: str) -> None:
    assert Decoder().id_of(FakeRecord(value)) == id


@pytest.mark.parametrize("depth", [900, 1_023, 1_024, 5_000])
def test_a_large_number_changes_nothing_about_the_depth_that_is_read(depth: int) -> None:
    for number in ("1", "1e999", "9" * 250 + "e99"):
        value = f'{{"text":"да","x":{"[" * (depth - 1)}{number}{"]" * (depth - 1)}}}'
        decoded = decode(value)
        assert isinstance(decoded, Event) == (depth <= 1_024), number


@pytest.mark.parametrize(
    "number", ["1e999.5", "01e999", "--1e999", "1e999e9", "+1e999", "1e999 1", '1e999""', ".1e999"]
)
def test_a_large_number_that_is_no_json_stays_none(number: str) -> None:
    decoded = decode(f'{{"text":"да","n":{number}}}')
    assert isinstance(decoded, Failure)
    assert decoded.reason == "invalid_json"


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
)
def test_results_are_the_bytes_of_their_fields(scored: list[Any], topic: str, model: str) -> None:
    records = [FakeRecord(b"", topic=topic, offset=offset, timestamp=at) for *_, offset, at in scored]
    sentiments = [Sentiment(label, numbers[0], numbers[1:]) for _, label, numbers, *_ in scored]
    truncated = [is_cut for *_, is_cut, _, _ in scored]
    events = [Event(id, "да") for id, *_ in scored]
    results = Encoder().encode(records, events, sentiments, truncated, model, PROCESSED_AT)
    for record, event, sentiment, is_cut, result in zip(records, events, sentiments, truncated, results, strict=True):
        source = {"topic": topic, "partition": record.partition, "offset": record.offset}
        event_time = iso_time(record.timestamp) if timestamp_ms(record) is not None else None
        fields = result_fields(event.id, sentiment, is_cut, model, source, event_time, PROCESSED_AT)
        assert isinstance(result, Outgoing)
        assert result.value == orjson.dumps(fields)
        assert result.timestamp == (record.timestamp if timestamp_ms(record) is not None else None)


# What would hold up its neighbours.


def holding(many: int) -> dict[str, bytes]:
    """Objects with so many commas and opening brackets, by what they are of."""
    rest = many - 3  # one bracket is the object's, one the list's, and one comma stands before it
    return {
        "numbers": b'{"text":"a","x":[' + b"1," * rest + b"1]}",
        "lists in lists": b'{"text":"a","x":[' + b"[],1," * (rest // 3) + b"1" + b",1" * (rest % 3) + b"]}",
        "keys": b'{"text":"a","x":[0]' + b"".join(b',"%x":1' % number for number in range(rest)) + b"}",
        "commas of a string": b'{"text":"a","x":[0],"y":"' + b"," * (rest - 1) + b'"}',
    }


@pytest.mark.parametrize("kind", holding(9))
def test_a_value_of_very_many_values_is_not_even_read(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[bytes] = []
    loads = orjson.loads
    monkeypatch.setattr(orjson, "loads", lambda value: read.append(value) or loads(value))
    just, more = holding(MAX_VALUES)[kind], holding(MAX_VALUES + 1)[kind]
    assert isinstance(decode(just), Event)
    assert len(read) == 1
    failure = decode(more)
    assert isinstance(failure, Failure)
    assert failure.reason == "too_large"
    assert Decoder().id_of(FakeRecord(more)) == "texts-3-1201"
    assert len(read) == 1


@pytest.mark.parametrize("content_type", ["application/json", "application/cloudevents+json"])
def test_nor_is_that_of_a_cloud_event(content_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attributes = [(f"ce_{name}", value) for name, value in CE_ATTRIBUTES.items()]
    headers = [("content-type", content_type.encode()), *attributes]
    read: list[bytes] = []
    monkeypatch.setattr(orjson, "loads", read.append)
    failure = decode(b'{"text":"a","data":[' + b"1," * MAX_VALUES + b"1]}", headers)
    assert isinstance(failure, Failure)
    assert (failure.reason, read) == ("too_large", [])


CE_ATTRIBUTES = {"specversion": b"1.0", "id": b"1", "source": b"s", "type": b"t"}


def test_a_text_is_not_json_and_may_have_any_commas() -> None:
    text = "," * (MAX_VALUES + 1)
    assert isinstance(decode(text, input_format="text", max_text_chars=10**6), Event)


@pytest.mark.parametrize("digits", [b"1" * 10**6, b"-" + b"1" * 10**6, b"0." + b"1" * 10**6, b"1e" + b"9" * 10**6])
def test_a_number_of_a_million_digits_is_looked_at_twice_at_most(
    digits: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is, and once more with another number in its place; and it never becomes one of Python's integers."""
    read: list[int] = []
    loads = orjson.loads
    monkeypatch.setattr(orjson, "loads", lambda value: read.append(len(value)) or loads(value))
    assert isinstance(decode(b'{"text":"a","x":' + digits + b"}"), Event)
    assert len(read) <= 2
    assert sum(size > 1_000 for size in read) == 1


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
