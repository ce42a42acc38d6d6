"""Times of records: which are right, how old a record is, and how a result writes them. Pure; no clock of its own."""

import re
from datetime import UTC, datetime
from functools import lru_cache
from typing import Final

from worker.core.events import TIMESTAMP_HEADER, Headers, Record

LATEST_MS: Final = 253_402_300_799_999  # the end of the year 9999
LONGEST_AGE_S: Final = 365 * 86_400.0  # beyond it a timestamp is taken for one in another unit than ms, or for none
CLOCK_SKEW_S: Final = 1.0  # a timestamp may be so far ahead of this machine's clock
NO_TIME: Final = b"null"
BEYOND: Final = b"beyond the year 9999"
_MOMENT_SAID: Final = re.compile(rb"\d{1,15}")


def age_s(timestamp: int | None, now: float) -> float | None:
    """Seconds from a record's timestamp, in ms, to ``now``, in s. None where it has none, or one that cannot be right."""
    if timestamp is None or timestamp < 0 or not -CLOCK_SKEW_S <= (age := now - timestamp / 1000) <= LONGEST_AGE_S:
        return None
    return max(0.0, age)


def has_timestamp(record: Record) -> bool:
    return record.timestamp is not None and record.timestamp >= 0


def iso_time(milliseconds: float) -> str:
    """Milliseconds since 1970 as ``2026-11-23T10:00:00.000Z``. Raises ValueError or OverflowError beyond the year 9999."""
    seconds, rest = divmod(int(milliseconds), 1000)
    return f"{_iso_second(seconds)}.{rest:03d}Z"


@lru_cache(maxsize=4096)
def json_time(timestamp: int | None) -> bytes:
    """A record's timestamp as a result has it; BEYOND where it cannot be written."""
    if timestamp is None or timestamp < 0:
        return NO_TIME
    try:
        return f'"{iso_time(timestamp)}"'.encode()  # what orjson makes keeps the four kilobytes that it was written in
    except (ValueError, OverflowError):
        return BEYOND


def first_time(headers: Headers) -> bytes | None:
    """The timestamp that a replay has kept in a header, as a result has it. What is no such timestamp is not believed."""
    for name, value in headers:
        if name == TIMESTAMP_HEADER and value and _MOMENT_SAID.fullmatch(value) and int(value) <= LATEST_MS:
            return json_time(int(value))
    return None


@lru_cache(maxsize=64)  # neighbours share their second
def _iso_second(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}"
