"""How a decoder reads JSON: with a prefix, with large numbers, nested deeply, and with very many values."""

import orjson
import pytest

from tests.support.events import FakeRecord, decode
from worker.core.decoder import Decoder
from worker.core.events import Event, Failure
from worker.core.json_input import MAX_VALUES


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


def test_framed_json_that_is_no_utf_8_fails_at_its_own_byte() -> None:
    failure = decode(b'\x00\x00\x00\x00\xff{"text": "\xff"}')
    assert failure == Failure("decode", "invalid_utf8", failure.message)
    assert "at byte 15:" in failure.message


@pytest.mark.parametrize("depth", [900, 1_023, 1_024, 5_000])
def test_a_large_number_changes_nothing_about_the_depth_that_is_read(depth: int) -> None:
    for number in ("1", "1e999", "9" * 250 + "e99"):
        value = f'{{"text":"да","x":{"[" * (depth - 1)}{number}{"]" * (depth - 1)}}}'
        decoded = decode(value)
        assert isinstance(decoded, Event) == (depth <= 1_024), number


@pytest.mark.parametrize(
    "number", ["1e999.5", "01e999", "--1e999", "1e999e9", "+1e999", "1e999 1", '1e999""', ".1e999"]
)
def test_a_large_number_that_is_no_json_stays_invalid(number: str) -> None:
    decoded = decode(f'{{"text":"да","n":{number}}}')
    assert isinstance(decoded, Failure)
    assert decoded.reason == "invalid_json"


# --- Values that would take too long ---


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
def test_a_value_of_very_many_values_is_not_read(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_a_cloud_event_of_very_many_values_is_not_read_either(
    content_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    attributes = [(f"ce_{name}", value) for name, value in CE_ATTRIBUTES.items()]
    headers = [("content-type", content_type.encode()), *attributes]
    read: list[bytes] = []
    monkeypatch.setattr(orjson, "loads", read.append)
    failure = decode(b'{"text":"a","data":[' + b"1," * MAX_VALUES + b"1]}", headers)
    assert isinstance(failure, Failure)
    assert (failure.reason, read) == ("too_large", [])


CE_ATTRIBUTES = {"specversion": b"1.0", "id": b"1", "source": b"s", "type": b"t"}


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
