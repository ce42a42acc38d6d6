"""Dead letters: as they are written, as they are read back, and as a replay publishes their records."""

from dataclasses import replace
from typing import get_args

import pytest

from tests.support.events import AFTER_YEAR_9999, FAILURE, INVALID_TIMES, TEN, FakeRecord
from worker.core.dead_letters import dead_letter, read_dead_letter, record_to_replay, smaller_dead_letters
from worker.core.decoder import Decoder
from worker.core.events import Headers, Outgoing
from worker.reasons import Reason

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


# --- Dead letters back to records ---


def as_letter(outgoing: Outgoing) -> FakeRecord:
    return FakeRecord(outgoing.value, outgoing.key, outgoing.headers, TEN + 5, "dead", 0, 7)


@pytest.mark.parametrize("timestamp", [TEN, 0, -1, 2**63 - 1])
def test_a_dead_letter_is_read_back_and_replayed(timestamp: int) -> None:
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


@pytest.mark.parametrize("before", [b"0", b"1700000000000", b"%d" % (AFTER_YEAR_9999 - 1)])
def test_a_second_replay_keeps_the_first_timestamp(before: bytes) -> None:
    record = FakeRecord(b"{", headers=[("event.timestamp", before), ("h", b"1")])
    found = read_dead_letter(as_letter(dead_letter(record, FAILURE, "1.0")))
    assert found is not None
    assert [value for name, value in record_to_replay(found, "1").headers if name == "event.timestamp"] == [before]


@pytest.mark.parametrize("before", INVALID_TIMES)
def test_an_invalid_first_timestamp_is_replaced(before: bytes | None) -> None:
    record = FakeRecord(b"{", headers=[("event.timestamp", before)])
    found = read_dead_letter(as_letter(dead_letter(record, FAILURE, "1.0")))
    assert found is not None
    kept = [value for name, value in record_to_replay(found, "1").headers if name == "event.timestamp"]
    assert kept == [before, b"%d" % TEN]


LATER_REASONS = ("unknown_schema", "invalid_avro", "key_required", "invalid_utf16", "http_503", "3d")


@pytest.mark.parametrize("reason", [*get_args(Reason), *LATER_REASONS])
def test_a_dead_letter_of_every_reason_is_one(reason: Reason) -> None:
    found = read_dead_letter(as_letter(dead_letter(FakeRecord(b"{"), FAILURE._replace(reason=reason), "1.0")))
    assert found is not None
    assert found.reason == reason


def test_headers_that_others_have_appended_are_kept() -> None:
    letter = dead_letter(FakeRecord(b"{"), FAILURE, "1.0")
    letter.headers.append(("mirrored.by", b"x"))
    found = read_dead_letter(as_letter(letter))
    assert found is not None
    assert found.headers == [("mirrored.by", b"x")]


@pytest.mark.parametrize(("before", "after"), [(b"1", b"2"), (b"41", b"42"), (b"x", b"1"), (None, b"1")])
def test_a_replay_is_counted(before: bytes | None, after: bytes) -> None:
    found = read_dead_letter(
        as_letter(dead_letter(FakeRecord(b"{", headers=[("replay.count", before)]), FAILURE, "1.0"))
    )
    assert found is not None
    assert record_to_replay(found, "1").headers[:2] == [("event.id", b"1"), ("replay.count", after)]


@pytest.mark.parametrize("smaller", [0, 1])
def test_a_smaller_dead_letter_is_not_whole(smaller: int) -> None:
    found = read_dead_letter(as_letter(smaller_dead_letters(FakeRecord(b"{"), FAILURE, "1.0")[smaller]))
    assert found is not None
    assert not found.is_whole


@pytest.mark.parametrize(
    "headers", [[], [("error.stage", b"decode")], [("error.stage", b"x"), ("source.offset", b"y")]]
)
def test_another_record_is_no_dead_letter(headers: Headers) -> None:
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
def test_a_dead_letter_with_a_forged_header_is_none(name: str, value: bytes) -> None:
    """Believed, such a number would end the replay, each time anew, and such a reason its table."""
    letter = dead_letter(FakeRecord(b"{"), FAILURE, "1.0")
    assert read_dead_letter(as_letter(letter)) is not None
    letter = letter._replace(headers=[(own, value if own == name else said) for own, said in letter.headers])
    assert read_dead_letter(as_letter(letter)) is None
