"""Record bytes → event; event and sentiment → result bytes; what cannot be scored → dead letter. Pure.

The formats are those of the README's section on records.
"""

import codecs
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from enum import Enum
from functools import lru_cache, partial
from itertools import chain, repeat
from operator import itemgetter
from typing import Any, Final, Literal, NamedTuple, Protocol, TypeVar, cast

import numpy as np
import orjson

from worker.core import cloudevents
from worker.core.cloudevents import mode as _cloud_event_mode
from worker.core.sentiment import LABELS, Sentiment
from worker.reasons import Reason

Stage = Literal["decode", "infer", "publish"]
Headers = Sequence[tuple[str, bytes | None]]
Row = TypeVar("Row", bound=tuple[Any, ...])

CONTENT_TYPE: Final = "content-type"
ID_HEADER: Final = "event.id"
COUNT_HEADER: Final = "replay.count"
TIMESTAMP_HEADER: Final = "event.timestamp"  # the first timestamp of a replayed record, ms since 1970 in ASCII
ENRICHED_FIELD: Final = "sentiment"
MOST_VALUES: Final = 100_000  # in one record: each becomes an object of Python's, while all else waits
LATEST_MS: Final = 253_402_300_799_999  # the end of the year 9999
LONGEST_AGE_S: Final = 365 * 86_400.0  # beyond it a timestamp is taken for one in another unit than ms, or for none
CLOCK_SKEW_S: Final = 1.0  # a timestamp may be so far ahead of this machine's clock


class Record(Protocol):
    """What is needed of a consumed record; aiokafka's ConsumerRecord fits. The timestamp is in ms, negative for none."""

    @property
    def topic(self) -> str: ...
    @property
    def partition(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def timestamp(self) -> int: ...
    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def headers(self) -> Headers: ...


class Event(NamedTuple):
    """A record whose text can be scored."""

    id: str
    text: str


class Failure(NamedTuple):
    """Why a record becomes a dead letter. The message never holds any of its text."""

    stage: Stage
    reason: Reason
    message: str


class Null(Enum):
    """A record with a null value, or with a null text where the setting ``on_null_text`` is skip."""

    TOMBSTONE = "forwarded as it is: it has a key"
    SKIPPED = "skipped: a null with no key, or a null text, says nothing"


Decoded = Event | Failure | Null


def rows(kind: type[Row], *columns: Iterable[Any]) -> list[Row]:
    """Named tuples from columns, in half the time that calling ``kind`` for each would take."""
    return list(map(tuple.__new__, repeat(kind), zip(*columns)))  # noqa: B905 - a column may repeat without end


def is_empty(text: str) -> bool:
    """Whether no character of a text can be seen: all are white space, controls, formats, marks or fillers."""
    return all(map(_is_invisible, set(text[:_FIRST]))) and all(map(_is_invisible, set(text)))


@lru_cache(maxsize=4096)
def _is_invisible(char: str) -> bool:
    return char.isspace() or char in _FILLERS or unicodedata.category(char) in _INVISIBLE


def _any_empty(texts: Sequence[str]) -> bool:
    """Whether one of N texts is empty. Looks at their first characters, and further where one of these is invisible."""
    try:
        firsts = "".join(map(itemgetter(0), texts))
    except IndexError:  # it has no character at all
        return True
    invisible = set(filter(_is_invisible, firsts)) if _UNUSUAL.search(firsts) else set()
    return bool(invisible) and any(is_empty(text) for text in texts if text[0] in invisible)


class Outgoing(NamedTuple):
    """A record to publish. ``timestamp`` in ms, None for now. Its headers are a list: aiokafka takes nothing else."""

    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes | None]]
    timestamp: int | None


class Decoder:
    """Record → event, by the settings of the same names. ``text_fields``: where the text is in topics of their own."""

    def __init__(
        self, *, input_format: str = "json", output_mode: str = "result", text_field: str = "text", id_field: str = "id",
        max_text_chars: int = 100_000, text_fields: Mapping[str, str] | None = None, on_null_text: str = "dead_letter",
    ) -> None:  # fmt: skip
        self._is_text = input_format == "text"
        self._is_enriched = output_mode == "enrich"
        self._text_field = text_field
        self._id_path = id_field.split(".")
        self._find_text = _finder(text_field.split("."))
        self._text_fields = dict(text_fields or {})
        self._find_texts = {topic: _finder(path.split(".")) for topic, path in self._text_fields.items()}
        self._find_id = _finder(self._id_path)
        self._get_text = _getter(text_field.split("."))
        self._get_texts = {topic: _getter(path.split(".")) for topic, path in self._text_fields.items()}
        self._get_id = _getter(self._id_path)
        self._max_text_chars = max_text_chars
        self._skips_null_text = on_null_text == "skip"

    def decode(self, record: Record) -> Decoded:
        """Never raises, whatever the record holds."""
        value = record.value
        if value is None:
            return Null.SKIPPED if record.key is None else Null.TOMBSTONE
        headers = record.headers
        if headers and (mode := _cloud_event_mode(headers)):
            return self._decode_cloud_event(record, value, mode)
        if self._is_text:
            return self._decode_text(record, value)
        return self._decode_json(record, value)

    def decode_all(self, records: Sequence[Record]) -> list[Decoded]:
        """What ``decode`` answers for each of N records of one partition; for usual ones, in half the time."""
        decoded: list[Decoded] = []
        for begin in range(0, len(records), _RUN):
            run = records[begin : begin + _RUN]
            decoded += (None if self._is_text else self._usual(run)) or map(self.decode, run)
        return decoded

    def _usual(self, records: Sequence[Record]) -> list[Event] | None:
        """Events of records that all have a text and an id of their own; None where one is in any way unusual."""
        headers = [record.headers for record in records]
        if any(headers) and any(map(_cloud_event_mode, headers)):
            return None
        values = cast("list[bytes]", [record.value for record in records])
        if None in values or (max(map(len, values)) > MOST_VALUES and any(map(_may_hold_too_much, values))):
            return None
        get_text = self._get_texts.get(records[0].topic, self._get_text)
        try:
            objects = list(map(orjson.loads, values))
            if set(map(type, objects)) != {dict}:
                return None
            texts, ids = list(map(get_text, objects)), list(map(self._get_id, objects))
        except (orjson.JSONDecodeError, KeyError):
            return None
        if set(map(type, texts)) != {str} or _any_empty(texts):
            return None
        if max(map(len, texts)) > self._max_text_chars or (
            self._is_enriched and any(ENRICHED_FIELD in fields for fields in objects)
        ):
            return None
        kinds = set(map(type, ids))
        if kinds == {int} and min(ids) > 0 and max(ids) < 2**63:  # others may have been written in another way
            ids = list(map(str, ids))
        elif kinds != {str}:
            return None
        return rows(Event, ids, texts)

    def id_of(self, record: Record) -> str:
        """The event's id, whatever else is wrong with the record."""
        if record.value is not None and (mode := _cloud_event_mode(record.headers)):
            event = _cloud_event(record, record.value, mode)
            return _id_from_record(record) if isinstance(event, Failure) else event.id
        if self._is_text or record.value is None or _may_hold_too_much(record.value):
            return _id_from_record(record)
        try:
            fields = _loads(record.value)
        except orjson.JSONDecodeError:
            return _id_from_record(record)
        return self._id(record, record.value, _look_up(fields, self._id_path))

    def _decode_text(self, record: Record, value: bytes) -> Decoded:
        try:
            text = value.decode()
        except UnicodeDecodeError as error:
            return _failure("invalid_utf8", f"the value is not UTF-8 at byte {error.start}")
        return self._checked(text) or Event(_id_from_record(record), text)

    def _decode_json(self, record: Record, value: bytes) -> Decoded:
        fields = _object(value)
        text = fields if isinstance(fields, Failure) else self._text_in(record, fields)
        if type(text) is not str:
            return text  # type: ignore[return-value]  # mypy does not narrow by type()
        id = self._find_id(fields)  # type: ignore[arg-type]  # with a text there are fields
        return Event(id if type(id) is str else self._id(record, value, id), text)

    def _decode_cloud_event(self, record: Record, value: bytes, mode: cloudevents.Mode) -> Decoded:
        """By the content type of its data; where a binary one names none, as ``input_format`` says."""
        event = _cloud_event(record, value, mode)
        if isinstance(event, Failure):
            return event
        if event.data is cloudevents.NO_DATA:
            return _failure("missing_text", "the event has no data")
        if event.data is None and self._skips_null_text:
            return Null.SKIPPED
        is_text = cloudevents.is_text(event.media_type) if event.media_type else self._is_text
        if is_text and not self._is_enriched:
            return self._with_text(event.id, event.data)
        if is_text or (self._is_enriched and mode == "structured" and type(event.data) is bytes):
            return _failure("not_an_object", "the event's data is no JSON object, which output_mode enrich needs")
        if event.media_type and not cloudevents.is_json(event.media_type):
            return _failure("invalid_cloudevent", "the content type of the data is neither JSON nor text")
        return self._with_fields(record, event.id, event.data)

    def _with_text(self, id: str, data: Any) -> Decoded:
        try:
            text = data.decode() if type(data) is bytes else data
        except UnicodeDecodeError as error:
            return _failure("invalid_utf8", f"the data is not UTF-8 at byte {error.start}")
        if type(text) is not str:
            return _failure("text_not_string", "the event's data is not a string")
        return self._checked(text) or Event(id, text)

    def _with_fields(self, record: Record, id: str, data: Any) -> Decoded:
        fields = _object(data) if type(data) is bytes else data
        if isinstance(fields, Failure):
            return fields
        if type(fields) is not dict:
            return _failure("not_an_object", "the event's data is no JSON object")
        text = self._text_in(record, fields)
        return Event(id, text) if isinstance(text, str) else text

    def _text_in(self, record: Record, fields: dict[str, Any]) -> str | Failure | Null:
        """The text of an object that can be scored, and enriched where that is wanted."""
        text = self._find_texts.get(record.topic, self._find_text)(fields)
        if type(text) is not str:
            field = self._text_fields.get(record.topic, self._text_field)
            if self._skips_null_text and _is_null(fields, field.split(".")):
                return Null.SKIPPED
            if text is _MISSING:
                return _failure("missing_text", f"the object has no field {field}")
            return _failure("text_not_string", f"the field {field} is not a string")
        failure = self._checked(text)
        if failure is None and self._is_enriched and ENRICHED_FIELD in fields:
            failure = _failure("field_exists", f"the object has a field {ENRICHED_FIELD} already")
        return failure or text

    def _checked(self, text: str) -> Failure | None:
        if len(text) > self._max_text_chars:
            return _failure("too_large", f"the text has {len(text)} characters, more than {self._max_text_chars}")
        if is_empty(text):
            return _failure("empty_text", "the text is empty, or of white space and invisible characters alone")
        return None

    def _id(self, record: Record, value: bytes, found: Any) -> str:
        if type(found) in (int, float) and (abs(found) >= 2**63 or (found == 0 and b"-0" in value)):
            digits = _look_up(_loads_with_digits(value), self._id_path)  # orjson reads these as a float, and -0 as 0
            found = digits if isinstance(digits, str) else found
        if type(found) is int:
            return str(found)
        return found if isinstance(found, str) else _id_from_record(record)


class Encoder:
    """Events and sentiments → result bytes. ``group_id`` names the source of results that are CloudEvents.

    ``result_timestamp``: results and tombstones have their input's timestamp (event), or that of their publishing (now).
    """

    def __init__(
        self, *, output_mode: str = "result", output_format: str = "json", group_id: str = "",
        result_timestamp: str = "event",
    ) -> None:  # fmt: skip
        self._is_enriched = output_mode == "enrich"
        self._is_cloud_event = output_format == "cloudevents"
        self._source = cloudevents.source_of(group_id)
        self._is_dated_now = result_timestamp == "now"

    def encode(
        self,
        records: Sequence[Record],
        events: Sequence[Event],
        sentiments: Sequence[Sentiment],
        truncated: Sequence[bool],
        model: str,
        processed_at: str,
    ) -> list[Outgoing | Failure]:
        """The result records of N events of one partition.

        ``model`` is who scored them, name@revision; ``processed_at`` is as of ``iso_time``. The value has the bytes that
        ``orjson.dumps`` makes of ``result_fields``, and takes a third of the time.
        """
        if not records:
            return []
        labels, scores, probabilities = zip(*sentiments, strict=True)
        headers = [record.headers for record in records]
        event_times, timestamps = self._times(records, headers)
        columns = (
            _strings([event.id for event in events]),
            map(_LABEL_BYTES.__getitem__, labels),
            *_decimals(scores, probabilities),
            [b"true" if is_cut else b"false" for is_cut in truncated],
            [record.offset for record in records],
            event_times,
        )
        values: Iterable[bytes] = map(_template(records[0], model, processed_at).__mod__, zip(*columns, strict=True))
        if self._is_enriched:
            values = [_spliced(record, value) for record, value in zip(records, values, strict=True)]
        results: list[Outgoing | Failure] = [
            *rows(
                Outgoing,
                [record.key for record in records],
                values,
                self._headers(records, headers, events, processed_at),
                timestamps,
            )
        ]
        if _BEYOND in event_times:
            for place in [place for place, time in enumerate(event_times) if time is _BEYOND]:
                results[place] = Failure(
                    "publish", "invalid_timestamp", "the record's timestamp is beyond the year 9999"
                )
        return results

    def tombstone(self, record: Record) -> Outgoing:
        """The null of a key, to go on as it is but for the time, which is as of the results."""
        return tombstone(record)._replace(timestamp=None) if self._is_dated_now else tombstone(record)

    def _times(self, records: Sequence[Record], headers: list[Headers]) -> tuple[list[bytes], list[int | None]]:
        """What stands in the results for their events' times, and the results' own timestamps."""
        timestamps: list[int | None] = [record.timestamp for record in records]
        times = list(map(_json_time, timestamps))
        if self._is_dated_now:
            timestamps = [None] * len(records)
        elif _NO_TIME in times:
            timestamps = [None if time is _NO_TIME else at for at, time in zip(timestamps, times, strict=True)]
        if any(headers) and TIMESTAMP_HEADER in set(map(itemgetter(0), chain.from_iterable(headers))):
            times = [_first_time(own) or time for own, time in zip(headers, times, strict=True)]
        return times, timestamps

    def _headers(
        self, records: Sequence[Record], headers: list[Headers], events: Sequence[Event], processed_at: str
    ) -> Iterable[list[tuple[str, bytes | None]]]:
        if self._is_cloud_event:
            return [
                cloudevents.without_attributes(own)
                + cloudevents.attributes(_place(record), self._source, event.id, processed_at)
                for record, own, event in zip(records, headers, events, strict=True)
            ]
        if not any(headers):
            return repeat(_JSON_HEADERS)
        return map(_of_the_enriched if self._is_enriched else _as_json, headers)


def _template(record: Record, model: str, processed_at: str) -> bytes:
    """Of the results of one partition; takes what differs between them, as JSON, in order."""
    by, topic, now = (orjson.dumps(word).replace(b"%", b"%%") for word in (model, record.topic, processed_at))
    return (
        b'{"id":%%b,"label":%%b,"score":%%b,'
        b'"probabilities":{"negative":%%b,"neutral":%%b,"positive":%%b},"truncated":%%b,"model":%b,'
        b'"source":{"topic":%b,"partition":%d,"offset":%%d},"event_time":%%b,"processed_at":%b}'
    ) % (by, topic, record.partition, now)


def result_fields(
    id: str, sentiment: Sentiment, truncated: bool, model: str, source: dict[str, Any] | None, event_time: str | None,
    processed_at: str,
) -> dict[str, Any]:  # fmt: skip
    """The result record's fields, numbers with six decimals."""
    negative, neutral, positive = sentiment.probabilities
    return {
        "id": id,
        "label": sentiment.label,
        "score": _six(sentiment.score),
        "probabilities": {LABELS[0]: _six(negative), LABELS[1]: _six(neutral), LABELS[2]: _six(positive)},
        "truncated": truncated,
        "model": model,
        "source": source,
        "event_time": event_time,
        "processed_at": processed_at,
    }


def tombstone(record: Record) -> Outgoing:
    """The null of a key, to go on as it is."""
    return Outgoing(record.key, None, list(record.headers), record.timestamp if has_timestamp(record) else None)


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
    if has_timestamp(record) and _first_time(record.headers) is None:
        headers.append((TIMESTAMP_HEADER, _ascii(record.timestamp)))
    return Outgoing(record.key, record.value, headers, None)


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


_NO_TIME: Final = b"null"
_BEYOND: Final = b"beyond the year 9999"


@lru_cache(maxsize=4096)
def _json_time(timestamp: int | None) -> bytes:
    """A record's timestamp as a result has it; _BEYOND where it cannot be written."""
    if timestamp is None or timestamp < 0:
        return _NO_TIME
    try:
        return f'"{iso_time(timestamp)}"'.encode()  # what orjson makes keeps the four kilobytes that it was written in
    except (ValueError, OverflowError):
        return _BEYOND


def _first_time(headers: Headers) -> bytes | None:
    """The timestamp that a replay has kept in a header, as a result has it. What is no such timestamp is not believed."""
    for name, value in headers:
        if name == TIMESTAMP_HEADER and value and _MOMENT_SAID.fullmatch(value) and int(value) <= LATEST_MS:
            return _json_time(int(value))
    return None


@lru_cache(maxsize=64)  # neighbours share their second
def _iso_second(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}"


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
_MOMENT_SAID: Final = re.compile(rb"\d{1,15}")
_REASON_SAID: Final = re.compile(rb"[a-z0-9_]{1,64}")  # also one of another version
_MISSING: Final = object()
_RUN: Final = 128  # records that are looked at together: of a longer run more would have to be looked at again
# A number beyond any float has one or the other: with fewer digits and a smaller exponent it stays below 1e299.
_LARGE_NUMBER: Final = re.compile(rb"(?<!\d)\d{200}|[eE]\+?\d{3}")
# Strings with what stands between them, an unfinished one to the end; or a number that may be too large for 64 bits or for
# a float, or -0: its whole part and the rest. Possessive, and strings are taken many at once, so that it stays quick.
_STRING: Final = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?+'
_LITERAL: Final = re.compile(
    rb"%b(?:[^\"0-9-]*+%b)*+"
    rb"|(?<![\d.eE+-])(?=-0|-?\d{19}|-?\d++(?:\.\d++)?+[eE]\+?+\d{3})"
    rb"(-?+(?:0|[1-9]\d*+))((?:\.\d++)?+(?:[eE][+-]?+\d++)?+)" % (_STRING, _STRING),
    re.DOTALL,
)
_DIGITS_OF_64_BITS: Final = 18  # so many always fit


def _may_hold_too_much(value: bytes) -> bool:
    """Each value but the first stands behind a comma or a bracket. Those in strings count too: it is quick, not exact."""
    return len(value) > MOST_VALUES and sum(map(value.count, (b",", b"[", b"{"))) > MOST_VALUES


def _loads(value: bytes) -> Any:
    """JSON to Python. orjson refuses numbers beyond any float, which are JSON too: it is given smaller ones."""
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError as error:
        if not _LARGE_NUMBER.search(value):
            raise
        try:
            return orjson.loads(_LITERAL.sub(_smaller, value))
        except orjson.JSONDecodeError:
            raise error from None  # its position is one in the value


def _loads_with_digits(value: bytes) -> Any:
    """Valid JSON to Python, with strings of digits for integers of more than 18 digits and for -0."""
    return orjson.loads(_LITERAL.sub(_quoted, value))


def _smaller(literal: re.Match[bytes]) -> bytes:
    if literal[1] is None or not _LARGE_NUMBER.search(literal[0]):
        return literal[0]
    return b"-1e300" if literal[0].startswith(b"-") else b"1e300"


def _quoted(literal: re.Match[bytes]) -> bytes:
    whole = literal[1]
    if whole and not literal[2] and (len(whole) > _DIGITS_OF_64_BITS or whole == b"-0"):
        return b'"%b"' % whole
    return _smaller(literal)


def _finder(path: list[str]) -> Callable[[dict[str, Any]], Any]:
    """Finds a field of an object by its path; answers with _MISSING where it is not."""
    if len(path) > 1:
        return partial(_look_up, path=path)
    return lambda fields: fields.get(path[0], _MISSING)


def _getter(path: list[str]) -> Callable[[Any], Any]:
    """As ``_finder``, but raises KeyError where there is no such field, and is native code for a path of one name."""
    return itemgetter(path[0]) if len(path) == 1 else partial(_got, path=path)


def _got(fields: Any, path: list[str]) -> Any:
    found = _look_up(fields, path)
    if found is _MISSING:
        raise KeyError
    return found


def _look_up(fields: Any, path: list[str]) -> Any:
    for name in path:
        if not isinstance(fields, dict) or name not in fields:
            return _MISSING
        fields = fields[name]
    return fields


def _is_null(fields: Any, path: list[str]) -> bool:
    """Whether the value at a path is null, or one that it leads through."""
    for name in path:
        if not isinstance(fields, dict) or name not in fields:
            return False
        fields = fields[name]
        if fields is None:
            return True
    return False


def _failure(reason: Reason, message: str) -> Failure:
    return Failure("decode", reason, message)


_FRAME: Final = 5  # bytes: a zero, and a schema's id in a schema registry
_TOO_MUCH: Final = _failure("too_large", f"the value has more than {MOST_VALUES} commas and opening brackets")


def _object(value: bytes) -> dict[str, Any] | Failure:
    """The fields of a JSON object, or why it is none that is read."""
    if _may_hold_too_much(value):
        return _TOO_MUCH
    try:
        fields = _loads(value)
    except orjson.JSONDecodeError as error:
        return _unreadable(value, error.pos)
    return fields if type(fields) is dict else _failure("not_an_object", "the value is JSON, but not an object")


def _unreadable(value: bytes, position: int) -> Failure:
    begin = _beginning(value)
    # Of a frame in front of JSON the id may be no UTF-8; that a producer's letters have one reason should not hang on it.
    is_framed = value.startswith(b"\0") and value[_FRAME:].lstrip().startswith((b"{", b"["))
    skipped = _FRAME if is_framed else 0
    try:
        value[skipped:].decode()
    except UnicodeDecodeError as error:
        return _failure("invalid_utf8", f"the value is not UTF-8 at byte {skipped + error.start}{begin}")
    return _failure("invalid_json", f"the value is not JSON at character {position}{begin}")


def _beginning(value: bytes) -> str:
    """What a producer has put in front of a value, as the end of a sentence; nothing if it is nothing that is known."""
    if value.startswith(codecs.BOM_UTF8):
        return ": it begins with a byte order mark, which JSON has not"
    if value.startswith(b"\0") and len(value) > _FRAME:
        schema = int.from_bytes(value[1:_FRAME], "big")
        return (
            f": it begins with Confluent's framing, a zero byte and the id of a schema ({schema}), which JSON has not"
        )
    return ""


def _id_from_record(record: Record) -> str:
    for name, value in record.headers:
        if name == ID_HEADER and value:
            return value.decode(errors="replace")
    return _place(record)


def _place(record: Record) -> str:
    return f"{record.topic}-{record.partition}-{record.offset}"


def _cloud_event(record: Record, value: bytes, mode: cloudevents.Mode) -> cloudevents.CloudEvent | Failure:
    try:
        if mode == "binary":
            return cloudevents.binary(record.headers, value)
        cloudevents.look_at_format(record.headers)
        fields = _object(value)
        return fields if isinstance(fields, Failure) else cloudevents.structured(fields)
    except cloudevents.Malformed as error:
        return _failure("invalid_cloudevent", str(error))


def _spliced(record: Record, result: bytes) -> bytes:
    """The input with the result in it; in a structured CloudEvent in its data, for an attribute may be no object."""
    own = record.value or b""
    is_structured = record.headers and _cloud_event_mode(record.headers) == "structured"
    end = cloudevents.end_of_data(own) if is_structured else own.rindex(b"}")
    return b'%s,"%s":%s%s' % (own[:end], ENRICHED_FIELD.encode(), result, own[end:])


def _as_json(headers: Headers) -> list[tuple[str, bytes | None]]:
    """The input's headers with the result's content type in place of theirs. A result is not the event that it is about."""
    if not headers:
        return _JSON_HEADERS
    kept = [header for header in headers if header[0].lower() != CONTENT_TYPE]
    if _cloud_event_mode(headers):
        kept = [header for header in kept if not header[0].startswith(cloudevents.PREFIX)]
    return kept + _JSON_HEADERS


def _of_the_enriched(headers: Headers) -> list[tuple[str, bytes | None]]:
    """A CloudEvent with a field more in its data stays the event that it was."""
    return list(headers) if headers and _cloud_event_mode(headers) else _as_json(headers)


_FIRST: Final = 32  # characters, of which nearly always one can be seen
_FILLERS: Final = frozenset("\u115f\u1160\u3164\uffa0")  # of Hangul: letters by category
_INVISIBLE: Final = frozenset(("Cc", "Cf", "Mn", "Me"))
_UNUSUAL: Final = re.compile("[^!-~¡-¬®-\u02ff\u0370-\u0482]")  # what usual texts begin with can be seen
_JSON_HEADERS: Final[list[tuple[str, bytes | None]]] = [(CONTENT_TYPE, b"application/json")]
_LABEL_BYTES: Final = {label: orjson.dumps(label) for label in LABELS}
_MILLIONTHS: Final = 1_000_000


def _six(number: float) -> float:
    return round(number * _MILLIONTHS) / _MILLIONTHS  # of integers: no negative zero


def _decimals(scores: Sequence[float], probabilities: Sequence[tuple[float, ...]]) -> list[list[bytes]]:
    """Scores and probabilities as ``orjson.dumps`` writes what ``_six`` makes of them: four columns."""
    numbers = np.fromiter(chain(scores, *zip(*probabilities, strict=True)), float, 4 * len(scores))
    six = np.rint(numbers * _MILLIONTHS) / _MILLIONTHS + 0.0  # no negative zero
    written = orjson.dumps(six, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1].split(b",")
    return [written[begin : begin + len(scores)] for begin in range(0, len(written), len(scores))]


def _strings(words: list[str]) -> list[bytes]:
    """Each as ``orjson.dumps`` writes it."""
    written = orjson.dumps(words)[1:-1].split(b",")
    return written if len(written) == len(words) else [orjson.dumps(word) for word in words]  # one had a comma


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
