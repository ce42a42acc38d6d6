"""Dead letters: written of records, read back, and their records published again. Pure."""

import re
from typing import Final, NamedTuple

from worker.core.events import COUNT_HEADER, ID_HEADER, TIMESTAMP_HEADER, Failure, Headers, Outgoing, Record
from worker.core.timestamps import first_time, has_timestamp

_ERROR_HEADERS: Final = {
    "error.stage",
    "error.reason",
    "error.message",
    "error.value_bytes",
    "source.topic",
    "source.partition",
    "source.offset",
    "source.timestamp",
    "worker.version",
}
_TOPIC_SAID: Final = re.compile(rb"(?!\.{1,2}$)[A-Za-z0-9._-]{1,249}")
_DIGITS_SAID: Final = re.compile(rb"\d{1,19}")
_REASON_SAID: Final = re.compile(rb"[a-z0-9_]{1,64}")  # also one of another version


def dead_letter(record: Record, failure: Failure, version: str) -> Outgoing:
    """The record untouched, with the reason in its headers. Its timestamp is when it is published."""
    return Outgoing(record.key, record.value, [*record.headers, *_error_headers(record, failure, version)], None)


def smaller_dead_letters(record: Record, failure: Failure, version: str) -> list[Outgoing]:
    """What to send, one after the other, where the broker refuses a dead letter for its size.

    First with empty bytes for the value (a null would be a tombstone), then without the input's headers too.
    """
    errors = _error_headers(record, failure, version)
    errors.append(("error.value_bytes", _ascii(len(record.value or b""))))
    return [
        Outgoing(record.key, b"", [*record.headers, *errors], None),
        Outgoing(record.key, b"", errors, None),
    ]


class Original(NamedTuple):
    """The record that a dead letter was made of, and why it was. ``is_whole``: its value has been kept."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Headers
    reason: str
    is_whole: bool


def original(letter: Record) -> Original | None:
    """What a dead letter was made of; None for a record that is no dead letter.

    What the worker has added is what stands behind the last ``error.stage``; the input may have headers of such names too.
    Whoever may write to the topic may write anything there: what the worker never says is not believed.
    """
    names = [name for name, _ in letter.headers]
    if "error.stage" not in names:
        return None
    begin = len(names) - 1 - names[::-1].index("error.stage")
    added = {name: value or b"" for name, value in letter.headers[begin:]}
    try:
        return Original(
            _said(added["source.topic"], _TOPIC_SAID),
            _number_said(added["source.partition"], 32),
            _number_said(added["source.offset"], 64),
            -1 if added["source.timestamp"] == b"-1" else _number_said(added["source.timestamp"], 64),
            letter.key,
            letter.value,
            [
                *letter.headers[:begin],
                *(header for header in letter.headers[begin:] if header[0] not in _ERROR_HEADERS),
            ],
            _said(added["error.reason"], _REASON_SAID),
            "error.value_bytes" not in added,
        )
    except (KeyError, ValueError):
        return None


def _said(value: bytes, form: re.Pattern[bytes]) -> str:
    """A header's value. Raises ValueError for one that the worker would not have written."""
    if not form.fullmatch(value):
        raise ValueError
    return value.decode()


def _number_said(value: bytes, bits: int) -> int:
    number = int(_said(value, _DIGITS_SAID))
    if number >= 2 ** (bits - 1):
        raise ValueError
    return number


def revived(record: Original, id: str) -> Outgoing:
    """The record to publish again: as it was, with its event's id in a header, and how often it has been replayed.

    It has the present time, for with its own the topic's retention might delete it before anyone reads it; its first
    timestamp goes into a header, unless an earlier replay has put it there.
    """
    times = max((_count(value) for name, value in record.headers if name == COUNT_HEADER), default=0) + 1
    headers = [header for header in record.headers if header[0] not in (ID_HEADER, COUNT_HEADER)]
    headers += [(ID_HEADER, id.encode()), (COUNT_HEADER, _ascii(times))]
    if has_timestamp(record) and first_time(record.headers) is None:
        headers.append((TIMESTAMP_HEADER, _ascii(record.timestamp)))
    return Outgoing(record.key, record.value, headers, None)


def _count(value: bytes | None) -> int:
    return int(value) if value and value.isdigit() and len(value) < 10 else 0


def _ascii(number: int) -> bytes:
    return str(number).encode()


def _error_headers(record: Record, failure: Failure, version: str) -> list[tuple[str, bytes | None]]:
    return [
        ("error.stage", failure.stage.encode()),
        ("error.reason", failure.reason.encode()),
        ("error.message", failure.message.encode()),
        ("source.topic", record.topic.encode()),
        ("source.partition", _ascii(record.partition)),
        ("source.offset", _ascii(record.offset)),
        ("source.timestamp", _ascii(record.timestamp if has_timestamp(record) else -1)),
        ("worker.version", version.encode()),
    ]
