"""The schemas fit what the worker publishes, and what was written by an old one can be read by the new one."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fastavro
import pytest
from fastavro.validation import validate
from jsonschema import Draft202012Validator

from tests.support.events import CARD, FAILURE, MODEL, PROCESSED_AT, FakeRecord
from worker.core.avro_encoder import AvroEncoder
from worker.core.dead_letters import dead_letter, smaller_dead_letters
from worker.core.encoder import Encoder
from worker.core.events import Event, Outgoing
from worker.core.schemas import DEAD_LETTER, RESULT, SCHEMAS
from worker.core.sentiment import CARD as CARD_LABELS
from worker.core.sentiment import LabelSet, Sentiment

FIRST_VERSION = json.loads((Path(__file__).parents[1] / "fixtures" / "result-1.avsc").read_text(encoding="utf-8"))
OF_RESULTS = Draft202012Validator(SCHEMAS["result", "json"]())
OF_DEAD_LETTERS = Draft202012Validator(SCHEMAS["dead-letter", "json"]())
OTHERS = LabelSet(("toxic", "insult"), "sigmoid", None, 0.5)


def results(encoder: Encoder) -> list[bytes]:
    """A result of each sort: with and without a time, a score, a list of labels, windows."""
    records = [FakeRecord(b""), FakeRecord(b"", timestamp=-1)]
    events, cut = [Event("42", "да"), Event("", "да")], [False, True]
    toxic = Sentiment("toxic", None, (0.75, 0.25))
    encoded = [
        *encoder.encode(records, events, [CARD] * 2, cut, MODEL, PROCESSED_AT),
        *encoder.encode(records, events, [CARD] * 2, cut, MODEL, PROCESSED_AT, windows=[1, 8]),
        *encoder.encode(records, events, [toxic] * 2, cut, MODEL, PROCESSED_AT, labels=OTHERS),
        *encoder.encode(
            records, events, [CARD] * 2, cut, MODEL, PROCESSED_AT, labels=CARD_LABELS._replace(threshold=0.9)
        ),
    ]
    return [result.value or b"" for result in encoded if isinstance(result, Outgoing)]


def headers_of(letter: Outgoing) -> dict[str, str]:
    return {name: (value or b"").decode() for name, value in letter.headers}


@pytest.mark.parametrize("form", SCHEMAS)
def test_each_schema_is_one(form: tuple[str, str]) -> None:
    if form[1] == "json":
        Draft202012Validator.check_schema(SCHEMAS[form]())
    else:
        fastavro.parse_schema(SCHEMAS[form]())


def test_each_sort_of_result_in_json_fits_and_has_no_other_fields() -> None:
    seen = set()
    for value in results(Encoder()):
        fields = json.loads(value)
        OF_RESULTS.validate(fields)
        assert list(fields) == [field.name for field in RESULT if field.name in fields], "in their order"
        seen |= set(fields)
    assert seen == {field.name for field in RESULT}


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("id", 42),
        ("label", None),
        ("score", "0.5"),
        ("probabilities", {"negative": 2}),
        ("labels", None),
        ("truncated", 0),
        ("windows", None),
        ("source", {"topic": "t", "partition": 0}),
        ("event_time", 1_795_428_000_000),
    ],
)
def test_another_type_does_not_fit(field: str, wrong: object) -> None:
    fields = json.loads(results(Encoder())[0])
    assert not OF_RESULTS.is_valid({**fields, field: wrong})


@pytest.mark.parametrize("field", [field.name for field in RESULT if field.presence != "optional"])
def test_a_field_that_is_always_there_is_required(field: str) -> None:
    fields = json.loads(results(Encoder())[0])
    del fields[field]
    assert not OF_RESULTS.is_valid(fields)


def test_the_headers_of_dead_letters_fit_and_have_no_others() -> None:
    records = [FakeRecord(b"xyz"), FakeRecord(b"xyz", timestamp=-1)]
    letters = [
        letter
        for record in records
        for letter in (dead_letter(record, FAILURE, "0.2.0"), *smaller_dead_letters(record, FAILURE, "0.2.0"))
    ]
    avro = fastavro.parse_schema(SCHEMAS["dead-letter", "avro"]())
    assert isinstance(avro, dict)
    seen = set()
    for letter in letters:
        headers = headers_of(letter)
        OF_DEAD_LETTERS.validate(headers)
        seen |= set(headers)
        fields = {field["name"]: of_avro(field, headers.get(field["header"])) for field in avro["fields"]}
        validate(fields, avro)
    assert seen == {field.name for field in DEAD_LETTER}
    assert not OF_DEAD_LETTERS.is_valid({**headers, "source.offset": "-1"})


def of_avro(field: dict[str, Any], header: str | None) -> object:
    kinds = field["type"] if isinstance(field["type"], list) else [field["type"]]
    return int(header) if header is not None and {"int", "long"} & set(kinds) else header


def of_fields(schema: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {**schema, "fields": [field for field in schema["fields"] if field["name"] in names]}


def test_a_result_of_the_first_version_can_be_read_by_the_schema_of_this_one() -> None:
    first, now = (fastavro.parse_schema(schema) for schema in (FIRST_VERSION, SCHEMAS["result", "avro"]()))
    written = {
        "id": "42",
        "label": "negative",
        "score": None,
        "probabilities": {"negative": 0.5},
        "truncated": False,
        "model": MODEL,
        "source": {"topic": "t", "partition": 0, "offset": 2**40},
        "event_time": None,
        "processed_at": 1_795_428_000_000,
    }
    stream = io.BytesIO()
    fastavro.schemaless_writer(stream, first, written)
    stream.seek(0)
    read = fastavro.schemaless_reader(stream, first, now)
    assert isinstance(read, dict)
    assert {name: read[name] for name in written if name != "processed_at"} == {
        name: value for name, value in written.items() if name != "processed_at"
    }


def test_whatever_may_be_missing_has_a_default_and_nothing_of_the_first_version_is_gone() -> None:
    now = SCHEMAS["result", "avro"]()
    of_first = {field["name"]: field["type"] for field in FIRST_VERSION["fields"]}
    assert {field["name"]: field["type"] for field in now["fields"] if field["name"] in of_first} == of_first
    for field in now["fields"]:
        assert field["name"] in of_first or "default" in field, "old results lack it"
        assert isinstance(field["type"], list) == ("default" in field)


def test_each_sort_of_result_in_avro_can_be_read() -> None:
    schema = fastavro.parse_schema(SCHEMAS["result", "avro"]())
    for in_avro, in_json in zip(results(AvroEncoder(schema_id=7)), results(Encoder()), strict=True):
        fields: Any = fastavro.schemaless_reader(io.BytesIO(in_avro[5:]), schema, None)
        expected = json.loads(in_json)
        for name in ("event_time", "processed_at"):
            if fields[name]:
                fields[name] = fields[name].isoformat(timespec="milliseconds").replace("+00:00", "Z")
        assert fields == {"labels": None, "windows": None, **expected}
