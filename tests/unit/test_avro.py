"""Avro's binary encoding, read as far as it is wanted: any schema, and any bytes."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.avro import number, record, string, wrapped
from worker.core.avro import (
    MAX_ITEMS,
    OTHER,
    AvroSchema,
    InvalidAvro,
    TooLarge,
    UnreadableSchema,
    _Compiler,
    _skip_bytes,
    _Types,
    wanted,
)

SCALARS = st.one_of(
    st.text(max_size=300).map(lambda text: ("string", string(text), text)),
    st.integers(-(2**63), 2**63 - 1).map(lambda value: ("long", number(value), value)),
    st.just((["null", "string"], b"\0", None)),
    st.just(({"type": "enum", "name": "E", "symbols": ["A", "B"]}, b"\x02", "B")),
    st.just(("bytes", string("да"), OTHER)),
    st.just(({"type": "array", "items": "long"}, b"\x02\x02\0", OTHER)),
    st.just((record("Leaf", a="int"), b"\x02", OTHER)),
)


def read(schema: Any, value: bytes, *paths: str, references: tuple[Any, ...] = ()) -> Any:
    return AvroSchema(json.dumps(schema), [json.dumps(each) for each in references], wanted(paths)).read(value)


def at(fields: Any, path: str) -> Any:
    for name in path.split("."):
        fields = fields[name]
    return fields


@given(st.data(), SCALARS)
def test_a_value_is_found_wherever_it_is(data: st.DataObject, scalar: tuple[Any, bytes, Any]) -> None:
    schema, value, found = scalar
    whole, written, path = data.draw(wrapped(schema, value))
    assert at(read(whole, written, path, "id"), path) == found


@given(st.data())
def test_what_ends_early_or_goes_on_is_refused(data: st.DataObject) -> None:
    whole, written, path = data.draw(wrapped("string", string("да")))
    schema = AvroSchema(json.dumps(whole), [], wanted([path]))
    for each in (written[: data.draw(st.integers(0, len(written) - 1))], written + b"\0"):
        with pytest.raises(InvalidAvro):
            schema.read(each)


NODE = record("Node", text="string", next=["null", "Node"])
ALL = record(
    "All", n="null", b="boolean", s="string", u=["null", "string", "All"], m={"type": "map", "values": "All"},
    a={"type": "array", "items": "All"}, e={"type": "enum", "name": "E", "symbols": ["A"]}, text="string",
)  # fmt: skip


@given(st.binary(max_size=300), st.sampled_from(["text", "u.text", "m.k.text", "u.u.m.k.s"]))
def test_any_bytes_are_read_or_refused(value: bytes, path: str) -> None:
    schema = AvroSchema(json.dumps(ALL), [], wanted([path]))
    try:
        found = schema.read(value)
    except (InvalidAvro, TooLarge) as error:
        found = {"error": str(error)}
    assert type(found) is dict


HUGE = number(2**62)


@pytest.mark.parametrize(
    ("schema", "value", "error"),
    [
        (record("R", text="string"), HUGE, InvalidAvro),
        (record("R", text="string"), HUGE + b"x" * 1000, InvalidAvro),
        (record("R", text="string"), number(-1) + b"text", InvalidAvro),
        (record("R", text="bytes"), number(-(2**63)), InvalidAvro),
        (record("R", a={"type": "array", "items": "null"}, text="string"), HUGE + b"\0", InvalidAvro),
        (record("R", a={"type": "array", "items": "string"}), HUGE + b"\0", InvalidAvro),
        (record("R", a={"type": "array", "items": "double"}), HUGE + b"\0", InvalidAvro),
        (record("R", a={"type": "array", "items": "string"}), number(-(2**63)) + HUGE, InvalidAvro),
        (record("R", a={"type": "array", "items": "string"}), number(-1) + number(-1), InvalidAvro),
        (record("R", text={"type": "map", "values": "null"}), HUGE + b"\0", InvalidAvro),
        (record("R", a={"type": "array", "items": "string"}), number(MAX_ITEMS + 1) + b"\0" * 200_000, TooLarge),
        (record("R", a={"type": "array", "items": "string"}), b"\1\0" * (MAX_ITEMS + 1) + b"\0", TooLarge),
        (record("R", a={"type": "array", "items": "null"}), b"\2" * (MAX_ITEMS + 1) + b"\0", TooLarge),
        (record("R", text={"type": "map", "values": "null"}), number(MAX_ITEMS + 1) + b"\0" * 200_000, TooLarge),
        (record("R", u=["null", "string"]), number(2) + string("a"), InvalidAvro),
        (record("R", u=["null", "string"]), number(-1) + string("a"), InvalidAvro),
        (record("R", text="long"), b"\x80" * 1_000_000 + b"\0", InvalidAvro),
        (record("R", n="long"), b"\x80" * 1_000_000 + b"\0", InvalidAvro),
        (NODE, b"\0\x02" * 500_000 + b"\0\0", TooLarge),
        (record("R", r="R"), b"", TooLarge),
    ],
)
def test_no_length_number_or_nesting_is_trusted(schema: Any, value: bytes, error: type[Exception]) -> None:
    for path in ("text.inner", "other", "text"):
        with pytest.raises(error):
            read(schema, value, path)


@pytest.mark.parametrize(
    ("type", "value"),
    [
        ("string", string(b"\xff")),
        ({"type": "enum", "name": "E", "symbols": ["A"]}, number(-1)),
        ({"type": "enum", "name": "E", "symbols": ["A"]}, number(1)),
        ("long", b"\xff" * 9 + b"\x7f"),
    ],
)
def test_what_is_wanted_has_to_be_whole_and_what_is_skipped_need_not(type: Any, value: bytes) -> None:
    with pytest.raises(InvalidAvro):
        read(record("R", text=type), value, "text")
    assert read(record("R", text=type), value, "other") == {}


def test_an_array_of_numbers_is_skipped_at_once_however_long() -> None:
    schema = record("R", vector={"type": "array", "items": "float"}, text="string")
    assert read(schema, number(200_000) + b"\0" * 800_000 + b"\0" + string("да"), "text") == {"text": "да"}


def test_a_recursive_type_is_read_as_deep_as_the_path_leads() -> None:
    value = string("1") + b"\x02" + string("2") + b"\x02" + string("3") + b"\0"
    assert read(NODE, value, "next.next.text", "text") == {"text": "1", "next": {"next": {"text": "3"}}}


def test_names_are_found_in_their_namespace_and_in_references() -> None:
    author = {**record("Author", name="string"), "namespace": "com.example"}
    body = {**record("Body", text="string", author="Author"), "namespace": "com.example"}
    outer = {**record("Outer", body="com.example.Body", again="com.example.Body"), "namespace": "org.example"}
    value = string("да") + string("я") + string("нет") + string("ты")
    found = read(outer, value, "body.text", "again.author.name", references=(author, body))
    assert found == {"body": {"text": "да"}, "again": {"author": {"name": "ты"}}}


def test_a_name_with_a_dot_is_whole_and_in_no_other_namespace() -> None:
    fields = record("", a=record("a.b.C"), b={**record("b.C", text="string"), "namespace": ""}, found="b.C")["fields"]
    outer = {"type": "record", "name": "a.Outer", "fields": fields}
    assert read(outer, string("x") + string("да"), "found.text") == {"found": {"text": "да"}}


def test_a_record_that_many_branches_share_is_made_readable_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A schema of some hundred kB would hold up the event loop for half a minute else."""
    made: list[object] = []
    steps = _Compiler._steps
    monkeypatch.setattr(_Compiler, "_steps", lambda self, *of: made.append(of) or steps(self, *of))
    shared = record("Shared", text="string")
    branches = [record(f"Branch{at}", inner="Shared" if at else shared) for at in range(100)]
    assert read(record("Outer", outer=branches), number(99) + string("да"), "outer.inner.text") == {
        "outer": {"inner": {"text": "да"}}
    }
    assert len(made) == 1 + len(branches) + 1


def test_records_that_only_hold_another_one_cost_nothing() -> None:
    """An array of 100,000 of them, ninety deep, would hold up the event loop for a second."""
    schema = record("Innermost", nothing="null", text="string")
    for depth in range(90):
        schema = record(f"Around{depth}", inner=schema)
    assert _Compiler(lambda *_: None).skip(_Types().resolve(schema, "")) is _skip_bytes


def test_each_branch_of_a_union_at_the_top_has_its_own_fields() -> None:
    schema = [record("A", text="string"), record("B", other="int"), "string"]
    values = [b"\0" + string("да"), b"\x02\x02", b"\x04" + string("да")]
    assert [read(schema, value, "text") for value in values] == [{"text": "да"}, {}, "да"]


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ("{", "not JSON"),
        ('"Unknown"', "does not define"),
        ('{"type": "record", "name": "R"}', "no fields"),
        ('{"type": "record", "fields": []}', "no name"),
        ('{"type": "record", "name": "R", "fields": [{"name": "a"}]}', "no type"),
        ('{"type": "enum", "name": "E", "symbols": "A"}', "no symbols"),
        ('{"type": "fixed", "name": "F"}', "no size"),
        ('{"type": "array"}', "no items"),
        ("7", "no type"),
        ('{"type": "array", "items": ' * 1010 + '"string"' + "}" * 1010, "nested"),
    ],
)
def test_a_schema_that_is_none_of_avros_is_refused_with_the_reason(schema: str, why: str) -> None:
    with pytest.raises(UnreadableSchema, match=why):
        AvroSchema(schema, [], wanted(["text"]))


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=9), st.lists, max_leaves=5))
def test_any_json_is_a_schema_or_is_refused(schema: Any) -> None:
    more = ({"type": schema}, {"type": "record", "name": "R", "fields": schema}, {"type": "map", "values": schema})
    for each in (schema, *more):
        with contextlib.suppress(UnreadableSchema):
            AvroSchema(json.dumps(each), [], wanted(["text"]))
