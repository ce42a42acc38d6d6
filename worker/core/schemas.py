"""The schemas of results and of dead letters, in JSON Schema and in Avro, each from one list of fields. Pure.

https://json-schema.org/draft/2020-12 and https://avro.apache.org/docs/1.12.0/specification/
"""

from collections.abc import Callable
from typing import Any, Final, Literal, NamedTuple, get_args

import orjson

from worker.reasons import Reason

Schema = dict[str, Any]

NAMESPACE: Final = "sentiment_worker"
DRAFT: Final = "https://json-schema.org/draft/2020-12/schema"


class Kind(NamedTuple):
    """A type of values: as JSON Schema has it, and as Avro has it."""

    json: Schema
    avro: str | Schema


class Field(NamedTuple):
    """A field of a result, or a header of a dead letter.

    ``kind`` is a name and a list for a field that holds fields. A ``nullable`` field may be null. An ``optional`` one may be
    missing in JSON, and is null in Avro then.
    """

    name: str
    kind: "Kind | tuple[str, list[Field]]"
    description: str
    presence: Literal["always", "nullable", "optional"] = "always"


_SIZE: Final = {"type": "integer", "minimum": 0}
_PROBABILITY: Final = {"type": "number", "minimum": 0, "maximum": 1}

TEXT: Final = Kind({"type": "string"}, "string")
TEXTS: Final = Kind({"type": "array", "items": {"type": "string"}}, {"type": "array", "items": "string"})
FLAG: Final = Kind({"type": "boolean"}, "boolean")
NUMBER: Final = Kind({"type": "number"}, "double")
PROBABILITIES: Final = Kind(
    {"type": "object", "additionalProperties": _PROBABILITY}, {"type": "map", "values": "double"}
)
INTEGER: Final = Kind(_SIZE, "int")
LONG: Final = Kind(_SIZE, "long")
TIME: Final = Kind({"type": "string", "format": "date-time"}, {"type": "long", "logicalType": "timestamp-millis"})

# A registry takes other words in a description for another version of the schema. Fields are only ever added, each nullable
# or optional: then whoever reads by the new schema can read what was written by an old one.
RESULT: Final = [
    Field("id", TEXT, "The event's id"),
    Field("label", TEXT, "The most probable label"),
    Field("score", NUMBER, "The sum of probabilities times weights; null for labels without weights", "nullable"),
    Field("probabilities", PROBABILITIES, "The probability of each label"),
    Field("labels", TEXTS, "With a threshold, all labels whose probability reaches it", "optional"),
    Field("truncated", FLAG, "Whether the text was too long, so that only a part of it was scored"),
    Field("windows", INTEGER, "With long_text=windows, the number of windows that were scored", "optional"),
    Field("model", TEXT, "The checkpoint that scored the text, its revision, and settings that change results"),
    Field(
        "source",
        (
            "Source",
            [
                Field("topic", TEXT, "The input record's topic"),
                Field("partition", INTEGER, "Its partition"),
                Field("offset", LONG, "Its offset"),
            ],
        ),
        "Where the input record stands; the same in a repeat",
    ),
    Field("event_time", TIME, "The input record's timestamp; null if it has none", "nullable"),
    Field("processed_at", TIME, "When the result was made"),
]

# Header values are text, also where they hold numbers. A reader may meet the reasons of a newer worker.
DEAD_LETTER: Final = [
    Field(
        "error.stage",
        Kind({"type": "string", "enum": ["decode", "infer", "publish"]}, "string"),
        "The stage that refused the record",
    ),
    Field(
        "error.reason",
        Kind({"type": "string", "pattern": "^[a-z0-9_]{1,64}$", "examples": list(get_args(Reason))}, "string"),
        "Why it was refused",
    ),
    Field("error.message", TEXT, "A sentence, without any of the record's text"),
    Field("source.topic", TEXT, "The topic that the record came from"),
    Field("source.partition", Kind({"type": "string", "pattern": "^[0-9]+$"}, "int"), "Its partition, in decimal"),
    Field("source.offset", Kind({"type": "string", "pattern": "^[0-9]+$"}, "long"), "Its offset, in decimal"),
    Field(
        "source.timestamp",
        Kind({"type": "string", "pattern": "^(-1|[0-9]+)$"}, "long"),
        "Its timestamp, in ms since 1970, in decimal; -1 if it has none",
    ),
    Field("worker.version", TEXT, "The version of the worker that wrote the dead letter"),
    Field(
        "error.value_bytes",
        Kind({"type": "string", "pattern": "^[0-9]+$"}, "long"),
        "The length of the record's value, in decimal, where the value is left out because of its size",
        "optional",
    ),
]

_RESULT_IS: Final = "The value of a result of sentiment-worker"
_DEAD_LETTER_IS: Final = (
    "The headers that sentiment-worker adds to a record which cannot be scored; the record's key, value and headers stay "
    "as they were"
)


def result_json_schema() -> Schema:
    """The JSON Schema of the value of a result, with ``output_format`` json or cloudevents. Readers allow other fields."""
    return _json_document("SentimentResult", _RESULT_IS, RESULT)


def result_avro_schema() -> Schema:
    """The Avro schema of the value of a result, with ``output_format`` avro."""
    return _avro_record("SentimentResult", RESULT, namespace=NAMESPACE, doc=_RESULT_IS)


def dead_letter_json_schema() -> Schema:
    """The JSON Schema of an object that holds a dead letter's headers, which are text, by their names."""
    return _json_document("DeadLetterHeaders", _DEAD_LETTER_IS, DEAD_LETTER)


def dead_letter_avro_schema() -> Schema:
    """The Avro schema of a record that holds a dead letter's headers; the property ``header`` of a field has its name.

    The worker writes no such records: this is for whoever makes records or rows of the headers.
    """
    return _avro_record("DeadLetterHeaders", DEAD_LETTER, namespace=NAMESPACE, doc=_DEAD_LETTER_IS)


SCHEMAS: Final[dict[tuple[str, str], Callable[[], Schema]]] = {
    ("result", "json"): result_json_schema,
    ("result", "avro"): result_avro_schema,
    ("dead-letter", "json"): dead_letter_json_schema,
    ("dead-letter", "avro"): dead_letter_avro_schema,
}
"""What makes each schema, by what it describes and its format."""


def indented(schema: Schema) -> str:
    """A schema as people read it: what the command ``schema`` prints, and what docs/schemas has."""
    return orjson.dumps(schema, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE).decode()


def _json_document(title: str, description: str, fields: list[Field]) -> Schema:
    return {"$schema": DRAFT, "title": title, "description": description, **_json_object(fields)}


def _json_object(fields: list[Field]) -> Schema:
    return {
        "type": "object",
        "properties": {field.name: {"description": field.description, **_json_type(field)} for field in fields},
        "required": [field.name for field in fields if field.presence != "optional"],
    }


def _json_type(field: Field) -> Schema:
    of_value = field.kind.json if isinstance(field.kind, Kind) else _json_object(field.kind[1])
    return {**of_value, "type": [of_value["type"], "null"]} if field.presence == "nullable" else of_value


def _avro_record(name: str, fields: list[Field], **attributes: str) -> Schema:
    return {"type": "record", "name": name, **attributes, "fields": [_avro_field(field) for field in fields]}


def _avro_field(field: Field) -> Schema:
    """Avro allows no dots in names."""
    kind = field.kind.avro if isinstance(field.kind, Kind) else _avro_record(*field.kind)
    name = field.name.replace(".", "_")
    return {
        "name": name,
        "type": kind if field.presence == "always" else ["null", kind],
        **({} if field.presence == "always" else {"default": None}),
        "doc": field.description,
        **({} if name == field.name else {"header": field.name}),
    }
