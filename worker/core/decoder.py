"""From a consumed record to the event in it, or to the reason why there is none. Pure."""

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any, Final

import orjson

from worker.core import cloudevents
from worker.core.avro_input import AvroSchemas
from worker.core.empty_text import is_empty, is_invisible
from worker.core.events import ENRICHED_FIELD, ID_HEADER, Decoded, Event, Failure, Null, Record, named_tuples, place
from worker.core.framing import without_frame
from worker.core.json_input import MAX_VALUES, MISSING, FieldPath, decode_failure, read_object, read_with_digits

RUN: Final = 128  # records that are looked at together: one unusual one costs all of them the short way


class Decoder:
    """Finds the event in a record. The settings of the same names say where its text and its id are.

    ``text_fields`` has, by topic, the path to the text where a topic has it elsewhere than at ``text_field``, and
    ``input_formats`` the format where a topic has another. Avro is read by the schemas that the caller adds to ``schemas``:
    before it decodes records, those in ``missing_schemas``. With ``reads_frames`` JSON may stand in Confluent's framing.
    """

    def __init__(
        self, *, input_format: str = "json", output_mode: str = "result", text_field: str = "text", id_field: str = "id",
        max_text_chars: int = 100_000, text_fields: Mapping[str, str] | None = None, on_null_text: str = "dead_letter",
        input_formats: Mapping[str, str] | None = None, reads_frames: bool = False,
    ) -> None:  # fmt: skip
        self._default_format = input_format
        self._formats = input_formats or {}
        self._reads_frames = reads_frames
        self._is_enriched = output_mode == "enrich"
        self._text_path = FieldPath(text_field)
        self._text_paths = {topic: FieldPath(field) for topic, field in (text_fields or {}).items()}
        self._id_path = FieldPath(id_field)
        self.schemas = AvroSchemas([text_field, *(text_fields or {}).values(), id_field])
        self._max_text_chars = max_text_chars
        self._skips_null_text = on_null_text == "skip"

    def decode(self, record: Record) -> Decoded:
        """The event in a record, or why there is none. It never raises, whatever the record holds."""
        value = record.value
        if value is None:
            return Null.SKIPPED if record.key is None else Null.TOMBSTONE
        headers = record.headers
        if headers and (mode := cloudevents.mode(headers)):
            return self._decode_cloud_event(record, value, mode)
        format = self._format(record.topic)
        if format == "text":
            return self._with_text(_id_from_record(record), value, "value")
        fields, json = self._read(format, value)
        if isinstance(fields, Failure):
            return fields
        text = self._text_in(record.topic, fields)
        return Event(self._id(record, fields, json), text) if isinstance(text, str) else text

    def decode_all(self, records: Sequence[Record]) -> list[Decoded]:
        """What ``decode`` answers for each of N records of one topic; for usual ones in half the time."""
        decoded: list[Decoded] = []
        format = self._format(records[0].topic) if records else ""
        for begin in range(0, len(records), RUN):
            run = records[begin : begin + RUN]
            decoded += (None if format == "text" else self._usual_events(run, format)) or map(self.decode, run)
        return decoded

    def missing_schemas(self, records: Sequence[Record]) -> set[int]:
        """The ids of the schemas that have to be added before N records of one topic are decoded; none for JSON and text."""
        is_avro = records and self._format(records[0].topic) == "avro"
        return self.schemas.missing_in(records) if is_avro else set()

    @property
    def reads_avro(self) -> bool:
        """Whether Avro is the format of any topic."""
        return "avro" in (self._default_format, *self._formats.values())

    def id_of(self, record: Record) -> str:
        """The id of a record's event, whatever else is wrong with the record. It never raises."""
        value = record.value
        if value is not None and (mode := cloudevents.mode(record.headers)):
            event = _cloud_event(record, value, mode)
            return _id_from_record(record) if isinstance(event, Failure) else event.id
        format = self._format(record.topic)
        if value is None or format == "text":
            return _id_from_record(record)
        fields, json = self._read(format, value)
        return _id_from_record(record) if isinstance(fields, Failure) else self._id(record, fields, json)

    def _format(self, topic: str) -> str:
        return self._formats.get(topic, self._default_format)

    def _read(self, format: str, value: bytes) -> tuple[dict[str, Any] | Failure, bytes]:
        """The fields of a value, or why there are none; and the JSON that they were read from, empty where it is Avro."""
        if format == "avro":
            return self.schemas.read(value), b""
        json = without_frame(value) if self._reads_frames else value
        return read_object(json), json

    def _usual_events(self, records: Sequence[Record], format: str) -> list[Event] | None:
        """What ``decode`` answers for objects that all have a text and an id; None where anything is unusual."""
        headers, values = [record.headers for record in records], [record.value or b"" for record in records]
        if (any(headers) and any(map(cloudevents.mode, headers))) or max(map(len, values)) > MAX_VALUES:
            return None
        try:
            if format == "avro":
                objects = self.schemas.read_usual(values)
            else:
                objects = list(map(orjson.loads, map(without_frame, values) if self._reads_frames else values))
            if objects is None or set(map(type, objects)) != {dict}:
                return None
            texts = self._text_paths.get(records[0].topic, self._text_path).get_all(objects)
            ids = self._id_path.get_all(objects)
        except (orjson.JSONDecodeError, KeyError):
            return None
        if self._is_enriched and any(ENRICHED_FIELD in each for each in objects):
            return None
        if set(map(type, texts)) != {str} or not all(texts):
            return None
        if any(map(is_invisible, set(map(itemgetter(0), texts)))) and any(map(is_empty, texts)):
            return None
        kinds = set(map(type, ids))
        if kinds == {int} and min(ids) > 0 and max(ids) < 2**63:  # others may have been written in another way
            ids = list(map(str, ids))
        elif kinds != {str}:
            return None
        return named_tuples(Event, ids, texts) if max(map(len, texts)) <= self._max_text_chars else None

    def _decode_cloud_event(self, record: Record, value: bytes, mode: cloudevents.Mode) -> Decoded:
        """Its data is read by its content type; where a binary event names none, as ``input_format`` says."""
        event = _cloud_event(record, value, mode)
        if isinstance(event, Failure):
            return event
        if event.data is cloudevents.NO_DATA:
            return decode_failure("missing_text", "the event has no data")
        if event.data is None and self._skips_null_text:
            return Null.SKIPPED
        format = self._format(record.topic)
        if format == "avro" and mode == "binary" and (not event.media_type or cloudevents.is_avro(event.media_type)):
            return self._with_fields(record, event.id, self.schemas.read(event.data))
        is_text = cloudevents.is_text(event.media_type) if event.media_type else format == "text"
        if is_text and not self._is_enriched:
            return self._with_text(event.id, event.data, "data")
        if is_text or (self._is_enriched and mode == "structured" and type(event.data) is bytes):
            return decode_failure("not_an_object", "the event's data is no JSON object, which output_mode enrich needs")
        if event.media_type and not cloudevents.is_json(event.media_type):
            return decode_failure("invalid_cloudevent", "the content type of the data is neither JSON nor text")
        return self._with_fields(record, event.id, event.data)

    def _with_text(self, id: str, data: Any, name: str) -> Decoded:
        try:
            text = data.decode() if type(data) is bytes else data
        except UnicodeDecodeError as error:
            return decode_failure("invalid_utf8", f"the {name} is not UTF-8 at byte {error.start}")
        if type(text) is not str:
            return decode_failure("text_not_string", "the event's data is not a string")
        return self._refusal(text) or Event(id, text)

    def _with_fields(self, record: Record, id: str, data: Any) -> Decoded:
        fields = self._read("json", data)[0] if type(data) is bytes else data
        if isinstance(fields, Failure):
            return fields
        if type(fields) is not dict:
            return decode_failure("not_an_object", "the event's data is no JSON object")
        text = self._text_in(record.topic, fields)
        return Event(id, text) if isinstance(text, str) else text

    def _text_in(self, topic: str, fields: dict[str, Any]) -> str | Failure | Null:
        """The text of an object; a failure where it cannot be scored, or not be enriched though that is wanted."""
        path = self._text_paths.get(topic, self._text_path)
        text = path.get(fields)
        if type(text) is not str:
            if self._skips_null_text and path.is_null(fields):
                return Null.SKIPPED
            if text is MISSING:
                return decode_failure("missing_text", f"the object has no field {path}")
            return decode_failure("text_not_string", f"the field {path} is not a string")
        failure = self._refusal(text)
        if failure is None and self._is_enriched and ENRICHED_FIELD in fields:
            failure = decode_failure("field_exists", f"the object has a field {ENRICHED_FIELD} already")
        return failure or text

    def _refusal(self, text: str) -> Failure | None:
        """Why a text cannot be scored; None where it can."""
        if len(text) > self._max_text_chars:
            return decode_failure("too_large", f"the text has {len(text)} characters, more than {self._max_text_chars}")
        if is_empty(text):
            return decode_failure("empty_text", "the text is empty, or of white space and invisible characters alone")
        return None

    def _id(self, record: Record, fields: dict[str, Any], json: bytes) -> str:
        """The id of the event with these fields, which were read from this JSON; it is empty where they are Avro's."""
        id = self._id_path.get(fields)
        if json and type(id) in (int, float) and (abs(id) >= 2**63 or (id == 0 and b"-0" in json)):
            digits = self._id_path.get(read_with_digits(json))
            id = digits if type(digits) is str else id
        if type(id) is int:
            return str(id)
        return id if type(id) is str else _id_from_record(record)


def _id_from_record(record: Record) -> str:
    """The id of an event that has none of its own: that of its header, else its place."""
    for name, value in record.headers:
        if name == ID_HEADER and value:
            return value.decode(errors="replace")
    return place(record)


def _cloud_event(record: Record, value: bytes, mode: cloudevents.Mode) -> cloudevents.CloudEvent | Failure:
    try:
        if mode == "binary":
            return cloudevents.read_binary(record.headers, value)
        cloudevents.check_format(record.headers)
        fields = read_object(value)
        return fields if isinstance(fields, Failure) else cloudevents.read_structured(fields)
    except cloudevents.InvalidCloudEvent as error:
        return decode_failure("invalid_cloudevent", str(error))
