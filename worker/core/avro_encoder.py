"""From events and their sentiments to results in Avro, in the framing of Confluent's serializers. Pure.

The results of one partition are encoded together, column by column, as those in JSON are: fastavro, which takes one result
after the other as a dictionary, needs six times as long. There is one schema, the one of ``result_avro_schema``, so this
writes its fields in their order. The bytes are the ones that fastavro writes.

https://avro.apache.org/docs/1.12.0/specification/#binary-encoding
"""

from collections.abc import Iterable, Sequence
from datetime import datetime
from functools import lru_cache
from itertools import repeat
from struct import Struct
from typing import ClassVar, Final, NamedTuple

import numpy as np

from worker.core.avro import read_number, read_string
from worker.core.encoder import INVALID_TIMESTAMP, Encoder, reached_labels, rounded_columns
from worker.core.events import CONTENT_TYPE, Event, Failure, Headers, Outgoing, Record, named_tuples
from worker.core.framing import FRAME_BYTES, frame
from worker.core.sentiment import CARD, Floats, LabelSet, Sentiment
from worker.core.timestamps import MAX_TIMESTAMP_MS, timestamp_in, timestamp_ms

_NULL: Final = b"\0"  # the first branch of a union
_VALUE: Final = b"\x02"  # the second one, before its value
_END: Final = b"\0"  # of an array or a map
_DOUBLE: Final = Struct("<d")
_NUMBER_BYTES: Final = _DOUBLE.size


class AvroEncoder(Encoder):
    """Writes results by the schema of ``result_avro_schema``, which a registry knows by ``schema_id``."""

    _own_headers: ClassVar[list[tuple[str, bytes | None]]] = [(CONTENT_TYPE, b"application/avro")]

    def __init__(self, *, schema_id: int, result_timestamp: str = "event") -> None:
        super().__init__(result_timestamp=result_timestamp)
        self._frame = frame(schema_id)

    def encode(
        self,
        records: Sequence[Record],
        events: Sequence[Event],
        sentiments: Sequence[Sentiment],
        truncated: Sequence[bool],
        model: str,
        processed_at: str,
        *,
        labels: LabelSet = CARD,
        windows: Sequence[int] | None = None,
    ) -> list[Outgoing | Failure]:
        """As ``Encoder.encode``, with values in Avro. Numbers have the same six decimals, as doubles; times are in ms."""
        if not records:
            return []
        headers = [record.headers for record in records]
        timestamps = list(map(timestamp_ms, records))
        event_times = _first_times(timestamps, headers) if any(headers) else timestamps
        first = records[0]
        made_by = _string(model) + _string(first.topic) + _long(first.partition)
        values = map(
            b"".join,
            zip(
                repeat(self._frame),
                map(_string, [event.id for event in events]),
                *_sentiment_columns(sentiments, labels),
                [b"\1" if is_cut else b"\0" for is_cut in truncated],
                repeat(_NULL) if windows is None else [_VALUE + _long(count) for count in windows],
                repeat(made_by),
                [_long(record.offset) for record in records],
                map(_event_time, event_times),
                repeat(_long(_milliseconds(processed_at))),
            ),
        )
        keys = [record.key for record in records]
        own_headers = self._headers(records, headers, events, processed_at)
        own_timestamps = repeat(None) if self._is_dated_now else timestamps
        results: list[Outgoing | Failure] = [*named_tuples(Outgoing, keys, values, own_headers, own_timestamps)]
        if max(at or 0 for at in event_times) > MAX_TIMESTAMP_MS:
            return [
                INVALID_TIMESTAMP if (at or 0) > MAX_TIMESTAMP_MS else result
                for at, result in zip(event_times, results, strict=True)
            ]
        return results


class _AvroFormats(NamedTuple):
    """What the results of one model have in common: its labels' names, and the bytes of a score and all probabilities.

    ``places`` are the offsets in ``numbers`` of the score, where there is one, and of each probability.
    """

    names: dict[str, bytes]
    numbers: bytes
    places: list[int]


@lru_cache(maxsize=8)
def _formats(labels: LabelSet) -> _AvroFormats:
    names = {name: _string(name) for name in labels.names}
    numbers, places = bytearray(_NULL if labels.weights is None else _VALUE), []
    if labels.weights is not None:
        places.append(len(numbers))
        numbers += bytes(_NUMBER_BYTES)
    numbers += _long(len(names))
    for name in names.values():
        numbers += name
        places.append(len(numbers))
        numbers += bytes(_NUMBER_BYTES)
    return _AvroFormats(names, bytes(numbers + _END), places)


def _first_times(timestamps: Sequence[int | None], headers: Sequence[Headers]) -> list[int | None]:
    """The times of N events, in ms: of a replayed record the first one, which is in its headers."""
    replayed = map(timestamp_in, headers)
    return [at if first is None else first for first, at in zip(replayed, timestamps, strict=True)]


def _sentiment_columns(sentiments: Sequence[Sentiment], labels: LabelSet) -> list[Iterable[bytes]]:
    """Of N results the fields ``label``, ``score`` with ``probabilities``, and ``labels``."""
    formats = _formats(labels)
    names, scores, probabilities = zip(*sentiments, strict=True)
    rounded = rounded_columns(scores, probabilities, labels)
    return [
        map(formats.names.__getitem__, names),
        _numbers(rounded, len(sentiments), formats),
        _listed(rounded, labels, formats),
    ]


def _numbers(rounded: Floats, count: int, formats: _AvroFormats) -> list[bytes]:
    """The score and the probabilities of N results: the same bytes in each, but for the numbers."""
    width = len(formats.numbers)
    rows = np.tile(np.frombuffer(formats.numbers, np.uint8), (count, 1))
    for place, column in zip(formats.places, rounded, strict=True):
        rows[:, place : place + _NUMBER_BYTES] = column.astype("<f8").view(np.uint8).reshape(count, -1)
    written = rows.tobytes()
    return [written[begin : begin + width] for begin in range(0, count * width, width)]


def _listed(rounded: Floats, labels: LabelSet, formats: _AvroFormats) -> Iterable[bytes]:
    """The field ``labels`` of N results."""
    if labels.threshold is None:
        return repeat(_NULL)
    return (
        _VALUE + _array(list(reached)) for reached in reached_labels(rounded, labels.threshold, formats.names.values())
    )


def _array(items: list[bytes]) -> bytes:
    return b"".join([_long(len(items)), *items, _END]) if items else _END


@lru_cache(maxsize=4096)  # neighbours have the same
def _event_time(timestamp: int | None) -> bytes:
    return _NULL if timestamp is None else _VALUE + _long(timestamp)


@lru_cache(maxsize=64)
def _milliseconds(time: str) -> int:
    """A time as ``iso_time`` writes it, in ms since 1970."""
    return round(datetime.fromisoformat(time).timestamp() * 1000)


def _string(word: str) -> bytes:
    written = word.encode()
    return _long(len(written)) + written


def _long(number: int) -> bytes:
    """An integer of 64 bits: its sign as the lowest bit (zigzag), then seven bits a byte, the lowest first."""
    rest = number << 1 ^ number >> 63
    written = bytearray()
    while rest > 0x7F:
        written.append(rest & 0x7F | 0x80)
        rest >>= 7
    written.append(rest)
    return bytes(written)


def probabilities_in(value: bytes) -> dict[str, float]:
    """The probabilities in a result that AvroEncoder has written, by label. The console calls it, for a few results."""
    _, at = read_string(value, FRAME_BYTES)
    _, at = read_string(value, at)
    at += 1 if value[at : at + 1] == _NULL else 1 + _NUMBER_BYTES
    count, at = read_number(value, at)
    probabilities = {}
    for _ in range(count):
        name, at = read_string(value, at)
        (probabilities[name],) = _DOUBLE.unpack_from(value, at)
        at += _NUMBER_BYTES
    return probabilities
