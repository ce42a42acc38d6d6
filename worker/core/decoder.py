"""From a record to the event in it, or why there is none. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

import orjson

from worker.core import cloudevents
from worker.core.cloudevents import mode as _cloud_event_mode
from worker.core.empty_text import any_empty, is_empty
from worker.core.events import ENRICHED_FIELD, ID_HEADER, Decoded, Event, Failure, Null, Record, place, rows
from worker.core.json_input import (
    MISSING,
    MOST_VALUES,
    failure_to_decode,
    finder,
    getter,
    is_null,
    loads,
    loads_with_digits,
    look_up,
    may_hold_too_much,
    read_object,
)

_RUN: Final = 128  # records that are looked at together: of a longer run more would have to be looked at again


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
        self._find_text = finder(text_field.split("."))
        self._text_fields = dict(text_fields or {})
        self._find_texts = {topic: finder(path.split(".")) for topic, path in self._text_fields.items()}
        self._find_id = finder(self._id_path)
        self._get_text = getter(text_field.split("."))
        self._get_texts = {topic: getter(path.split(".")) for topic, path in self._text_fields.items()}
        self._get_id = getter(self._id_path)
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
        if None in values or (max(map(len, values)) > MOST_VALUES and any(map(may_hold_too_much, values))):
            return None
        get_text = self._get_texts.get(records[0].topic, self._get_text)
        try:
            objects = list(map(orjson.loads, values))
            if set(map(type, objects)) != {dict}:
                return None
            texts, ids = list(map(get_text, objects)), list(map(self._get_id, objects))
        except (orjson.JSONDecodeError, KeyError):
            return None
        if set(map(type, texts)) != {str} or any_empty(texts):
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
        if self._is_text or record.value is None or may_hold_too_much(record.value):
            return _id_from_record(record)
        try:
            fields = loads(record.value)
        except orjson.JSONDecodeError:
            return _id_from_record(record)
        return self._id(record, record.value, look_up(fields, self._id_path))

    def _decode_text(self, record: Record, value: bytes) -> Decoded:
        try:
            text = value.decode()
        except UnicodeDecodeError as error:
            return failure_to_decode("invalid_utf8", f"the value is not UTF-8 at byte {error.start}")
        return self._checked(text) or Event(_id_from_record(record), text)

    def _decode_json(self, record: Record, value: bytes) -> Decoded:
        fields = read_object(value)
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
            return failure_to_decode("missing_text", "the event has no data")
        if event.data is None and self._skips_null_text:
            return Null.SKIPPED
        is_text = cloudevents.is_text(event.media_type) if event.media_type else self._is_text
        if is_text and not self._is_enriched:
            return self._with_text(event.id, event.data)
        if is_text or (self._is_enriched and mode == "structured" and type(event.data) is bytes):
            return failure_to_decode(
                "not_an_object", "the event's data is no JSON object, which output_mode enrich needs"
            )
        if event.media_type and not cloudevents.is_json(event.media_type):
            return failure_to_decode("invalid_cloudevent", "the content type of the data is neither JSON nor text")
        return self._with_fields(record, event.id, event.data)

    def _with_text(self, id: str, data: Any) -> Decoded:
        try:
            text = data.decode() if type(data) is bytes else data
        except UnicodeDecodeError as error:
            return failure_to_decode("invalid_utf8", f"the data is not UTF-8 at byte {error.start}")
        if type(text) is not str:
            return failure_to_decode("text_not_string", "the event's data is not a string")
        return self._checked(text) or Event(id, text)

    def _with_fields(self, record: Record, id: str, data: Any) -> Decoded:
        fields = read_object(data) if type(data) is bytes else data
        if isinstance(fields, Failure):
            return fields
        if type(fields) is not dict:
            return failure_to_decode("not_an_object", "the event's data is no JSON object")
        text = self._text_in(record, fields)
        return Event(id, text) if isinstance(text, str) else text

    def _text_in(self, record: Record, fields: dict[str, Any]) -> str | Failure | Null:
        """The text of an object that can be scored, and enriched where that is wanted."""
        text = self._find_texts.get(record.topic, self._find_text)(fields)
        if type(text) is not str:
            field = self._text_fields.get(record.topic, self._text_field)
            if self._skips_null_text and is_null(fields, field.split(".")):
                return Null.SKIPPED
            if text is MISSING:
                return failure_to_decode("missing_text", f"the object has no field {field}")
            return failure_to_decode("text_not_string", f"the field {field} is not a string")
        failure = self._checked(text)
        if failure is None and self._is_enriched and ENRICHED_FIELD in fields:
            failure = failure_to_decode("field_exists", f"the object has a field {ENRICHED_FIELD} already")
        return failure or text

    def _checked(self, text: str) -> Failure | None:
        if len(text) > self._max_text_chars:
            return failure_to_decode(
                "too_large", f"the text has {len(text)} characters, more than {self._max_text_chars}"
            )
        if is_empty(text):
            return failure_to_decode(
                "empty_text", "the text is empty, or of white space and invisible characters alone"
            )
        return None

    def _id(self, record: Record, value: bytes, found: Any) -> str:
        if type(found) in (int, float) and (abs(found) >= 2**63 or (found == 0 and b"-0" in value)):
            digits = look_up(loads_with_digits(value), self._id_path)  # orjson reads these as a float, and -0 as 0
            found = digits if isinstance(digits, str) else found
        if type(found) is int:
            return str(found)
        return found if isinstance(found, str) else _id_from_record(record)


def _id_from_record(record: Record) -> str:
    for name, value in record.headers:
        if name == ID_HEADER and value:
            return value.decode(errors="replace")
    return place(record)


def _cloud_event(record: Record, value: bytes, mode: cloudevents.Mode) -> cloudevents.CloudEvent | Failure:
    try:
        if mode == "binary":
            return cloudevents.binary(record.headers, value)
        cloudevents.look_at_format(record.headers)
        fields = read_object(value)
        return fields if isinstance(fields, Failure) else cloudevents.structured(fields)
    except cloudevents.Malformed as error:
        return failure_to_decode("invalid_cloudevent", str(error))
