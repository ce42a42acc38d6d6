"""Dead letters: writing them, reading the original record back from one, and that record as a replay publishes it. Pure."""

import re
from typing import Final, NamedTuple

from worker.core.events import COUNT_HEADER, ID_HEADER, TIMESTAMP_HEADER, Failure, Headers, Outgoing, Record
from worker.core.schemas import DEAD_LETTER
from worker.core.timestamps import timestamp_in, timestamp_ms

_ERROR_HEADERS: Final = {field.name for field in DEAD_LETTER}
_TOPIC: Final = re.compile(rb"(?!\.{1,2}$)[A-Za-z0-9._-]{1,249}")
_NUMBER: Final = re.compile(rb"\d{1,19}")
_REASON: Final = re.compile(rb"[a-z0-9_]{1,64}")  # another version of the worker may have other reasons


class OriginalRecord(NamedTuple):
    """The record that a dead letter was made from, and the reason. The timestamp is in ms, -1 for none.

    ``is_whole`` says whether the dead letter has its value; where the broker refused that for its size, it is empty.
    """

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Headers
    reason: str
    is_whole: bool


def dead_letter(record: Record, failure: Failure, version: str) -> Outgoing:
    """The record untouched, with the failure in its headers. It gets the timestamp of its publishing."""
    return Outgoing(record.key, record.value, [*record.headers, *_error_headers(record, failure, version)], None)


def smaller_dead_letters(record: Record, failure: Failure, version: str) -> list[Outgoing]:
    """Two smaller forms of a dead letter, to be tried in turn where the broker refuses it for its size.

    The first has empty bytes for the value (a null would be a tombstone), the second lacks the record's headers too.
    """
    errors = _error_headers(record, failure, version)
    errors.append(("error.value_bytes", _ascii(len(record.value or b""))))
    return [
        Outgoing(record.key, b"", [*record.headers, *errors], None),
        Outgoing(record.key, b"", errors, None),
    ]


def read_dead_letter(letter: Record) -> OriginalRecord | None:
    """The record that a dead letter was made from; None for a record that is no dead letter.

    The worker's headers begin at the last ``error.stage``, for the original record may have headers of the same names.
    Anyone who may write to the topic can forge them, so a value that the worker would never write makes it no dead letter.
    """
    names = [name for name, _ in letter.headers]
    if "error.stage" not in names:
        return None
    begin = len(names) - 1 - names[::-1].index("error.stage")
    own, added = letter.headers[:begin], letter.headers[begin:]
    values = {name: value or b"" for name, value in added}
    try:
        return OriginalRecord(
            topic=_checked(values["source.topic"], _TOPIC),
            partition=_number(values["source.partition"], 32),
            offset=_number(values["source.offset"], 64),
            timestamp=-1 if values["source.timestamp"] == b"-1" else _number(values["source.timestamp"], 64),
            key=letter.key,
            value=letter.value,
            headers=[*own, *(header for header in added if header[0] not in _ERROR_HEADERS)],
            reason=_checked(values["error.reason"], _REASON),
            is_whole="error.value_bytes" not in values,
        )
    except (KeyError, ValueError):
        return None


def record_to_replay(record: OriginalRecord, id: str) -> Outgoing:
    """The record to publish again: untouched, with headers for its event's id and for how often it has been replayed.

    It gets the timestamp of its publishing, for with its own the topic's retention might delete it before it is read. Its
    own goes into a header, unless an earlier replay has put it there.
    """
    times = max((_count(value) for name, value in record.headers if name == COUNT_HEADER), default=0) + 1
    headers = [header for header in record.headers if header[0] not in (ID_HEADER, COUNT_HEADER)]
    headers += [(ID_HEADER, id.encode()), (COUNT_HEADER, _ascii(times))]
    timestamp = timestamp_ms(record)
    if timestamp is not None and timestamp_in(record.headers) is None:
        headers.append((TIMESTAMP_HEADER, _ascii(timestamp)))
    return Outgoing(record.key, record.value, headers, None)


def _error_headers(record: Record, failure: Failure, version: str) -> list[tuple[str, bytes | None]]:
    timestamp = timestamp_ms(record)
    return [
        ("error.stage", failure.stage.encode()),
        ("error.reason", failure.reason.encode()),
        ("error.message", failure.message.encode()),
        ("source.topic", record.topic.encode()),
        ("source.partition", _ascii(record.partition)),
        ("source.offset", _ascii(record.offset)),
        ("source.timestamp", _ascii(-1 if timestamp is None else timestamp)),
        ("worker.version", version.encode()),
    ]


def _checked(value: bytes, pattern: re.Pattern[bytes]) -> str:
    """A header's value as text. Raises ValueError for one that the worker would never write."""
    if not pattern.fullmatch(value):
        raise ValueError
    return value.decode()


def _number(value: bytes, bits: int) -> int:
    """A header's value as a number, if it fits into a signed integer of so many bits. Raises ValueError otherwise."""
    number = int(_checked(value, _NUMBER))
    if number >= 2 ** (bits - 1):
        raise ValueError
    return number


def _count(value: bytes | None) -> int:
    return int(value) if value and value.isdigit() and len(value) < 10 else 0


def _ascii(number: int) -> bytes:
    return str(number).encode()
