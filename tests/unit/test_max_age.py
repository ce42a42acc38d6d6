"""Records that are too old when they are decoded."""

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from worker.core.decoder import Decoder
from worker.core.events import Event, Failure, Null, TooOld
from worker.core.max_age import MaxAge

NOW = 1_000.0


def record(timestamp: int | None, offset: int = 0, value: bytes | None = b'{"id": "1", "text": "x"}') -> Any:
    return SimpleNamespace(
        topic="t", partition=0, offset=offset, timestamp=timestamp, key=b"k", value=value, headers=()
    )


def decoded(*records: Any, seconds: float = 60, new_from: int | None = None) -> list[Any]:
    return MaxAge(Decoder(), seconds, lambda: NOW).decode_all(records, new_from)


def test_a_record_is_too_old_where_its_timestamp_is_more_than_so_long_ago() -> None:
    event = Event("1", "x")
    assert decoded(record(939_999), record(940_000), record(2_000_000)) == [TooOld.WHEN_READ, event, event]


def test_what_has_no_age_or_no_text_is_decoded_as_usual() -> None:
    assert decoded(record(-1), record(None), record(0, value=None)) == [Event("1", "x")] * 2 + [Null.TOMBSTONE]


def test_a_record_that_is_too_old_is_not_decoded() -> None:
    (new, old) = decoded(record(1_000_000, value=b"no JSON"), record(0, value=b"no JSON"))
    assert isinstance(new, Failure)
    assert old is TooOld.WHEN_READ


def test_what_was_written_lately_did_not_wait() -> None:
    some = [record(0, offset) for offset in (8, 9, 10)]
    assert decoded(*some, new_from=9) == [TooOld.WHEN_READ, TooOld.WHEN_WRITTEN, TooOld.WHEN_WRITTEN]


@given(timestamps=st.lists(st.integers(-1, 2_000_000), max_size=20), seconds=st.floats(0.001, 2_000))
def test_the_others_are_decoded_as_without_it_and_in_their_order(timestamps: list[int], seconds: float) -> None:
    some = [record(at, offset, b'{"id": "%d", "text": "x"}' % offset) for offset, at in enumerate(timestamps)]
    plain = Decoder().decode_all(some)
    for each, with_age, without in zip(some, decoded(*some, seconds=seconds), plain, strict=True):
        is_old = 0 <= each.timestamp < (NOW - seconds) * 1000
        assert with_age == (TooOld.WHEN_READ if is_old else without)
