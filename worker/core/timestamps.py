"""Times of records: how old a record is, and how a result writes times. Pure: the caller brings the present time."""

import re
from datetime import UTC, datetime
from functools import lru_cache
from typing import Final

from worker.core.events import TIMESTAMP_HEADER, Headers, Record

MAX_TIMESTAMP_MS: Final = 253_402_300_799_999  # the end of the year 9999
MAX_AGE_S: Final = 365 * 86_400.0  # what seems older has a timestamp in another unit than ms, or a default in its place
MAX_CLOCK_SKEW_S: Final = 1.0  # a timestamp may be so far ahead of this machine's clock
NO_TIME: Final = b"null"
TOO_LATE: Final = b"beyond the year 9999"
_MILLISECONDS: Final = re.compile(rb"\d{1,15}")


def timestamp_ms(record: Record) -> int | None:
    """A record's timestamp, in ms since 1970; None where it has none."""
    timestamp = record.timestamp
    return timestamp if timestamp is not None and timestamp >= 0 else None


def age_s(timestamp: int | None, now: float) -> float | None:
    """Seconds from a record's timestamp, in ms, to ``now``, in s. None where it has none, or one that cannot be right."""
    if timestamp is None or timestamp < 0:
        return None
    age = now - timestamp / 1000
    return max(0.0, age) if -MAX_CLOCK_SKEW_S <= age <= MAX_AGE_S else None


def iso_time(milliseconds: float) -> str:
    """Milliseconds since 1970 as ``2026-11-23T10:00:00.000Z``. Raises ValueError or OverflowError beyond the year 9999."""
    seconds, rest = divmod(int(milliseconds), 1000)
    return f"{_iso_second(seconds)}.{rest:03d}Z"


@lru_cache(maxsize=4096)
def json_time(timestamp: int | None) -> bytes:
    """A record's timestamp as JSON: NO_TIME where it has none, TOO_LATE where it cannot be written."""
    if timestamp is None or timestamp < 0:
        return NO_TIME
    try:
        return f'"{iso_time(timestamp)}"'.encode()  # bytes of orjson.dumps would hold 4 KiB each
    except (ValueError, OverflowError):
        return TOO_LATE


def timestamp_in(headers: Headers) -> int | None:
    """The timestamp that a replay has put into the headers, in ms; None where there is none that is valid."""
    for name, value in headers:
        if name == TIMESTAMP_HEADER and value and _MILLISECONDS.fullmatch(value) and int(value) <= MAX_TIMESTAMP_MS:
            return int(value)
    return None


@lru_cache(maxsize=64)  # neighbours have the same second
def _iso_second(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}"
