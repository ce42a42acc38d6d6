"""Avro's binary encoding, written by hand for tests: another implementation than the worker's, the other way round."""

import struct
from typing import Any

from hypothesis import strategies as st


def number(value: int) -> bytes:
    """An int or a long: zigzag, then seven bits a byte, the lowest first."""
    value = (value << 1) ^ (value >> 63)
    written = b""
    while value > 0x7F:
        written += bytes([value & 0x7F | 0x80])
        value >>= 7
    return written + bytes([value])


def string(value: str | bytes) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return number(len(value)) + value


def record(name: str, /, **fields: object) -> dict[str, Any]:
    """The schema of a record, from the types of its fields."""
    return {"type": "record", "name": name, "fields": [{"name": key, "type": type} for key, type in fields.items()]}


REVIEW = record("Review", id="long", text=["null", "string"], stars="int")


def review(id: int, text: str | None, stars: int = 5) -> bytes:
    """A value with the schema REVIEW."""
    return number(id) + (b"\0" if text is None else b"\x02" + string(text)) + number(stars)


@st.composite
def blocks(draw: st.DrawFn, items: list[bytes]) -> bytes:
    """An array's or a map's items, as one block or as several, each with its size in bytes or without."""
    written, left = b"", items
    while left:
        size = draw(st.integers(1, len(left)))
        block, left = b"".join(left[:size]), left[size:]
        written += number(-size) + number(len(block)) + block if draw(st.booleans()) else number(size) + block
    return written + b"\0"


@st.composite
def typed(draw: st.DrawFn, names: list[str], depth: int = 2) -> tuple[Any, bytes]:
    """Any type as a schema, and a value of it. `names` are those that other types have."""
    kinds = ["null", "boolean", "int", "long", "float", "double", "bytes", "string", "enum", "fixed"]
    kind = draw(st.sampled_from(kinds + ["array", "map", "union", "record"] * (depth > 0)))
    name = f"T{len(names)}"
    match kind:
        case "null":
            return kind, b""
        case "boolean":
            return kind, draw(st.sampled_from([b"\0", b"\1"]))
        case "int":
            return kind, number(draw(st.integers(-(2**31), 2**31 - 1)))
        case "long":
            return {"type": kind, "logicalType": "timestamp-millis"}, number(draw(st.integers(-(2**63), 2**63 - 1)))
        case "float":
            return kind, struct.pack("<f", draw(st.floats(width=32)))
        case "double":
            return kind, struct.pack("<d", draw(st.floats()))
        case "bytes" | "string":
            return kind, string(draw(st.text(max_size=200)))
        case "enum":
            names.append(name)
            return {"type": kind, "name": name, "symbols": ["A", "B"]}, number(draw(st.integers(0, 1)))
        case "fixed":
            names.append(name)
            return {"type": kind, "name": name, "size": 3}, draw(st.binary(min_size=3, max_size=3))
        case "array" | "map":
            schema, value = draw(typed(names, depth - 1))
            count = draw(st.integers(0, 3))
            items = [string(f"k{key}") + value if kind == "map" else value for key in range(count)]
            return {"type": kind, "items" if kind == "array" else "values": schema}, draw(blocks(items))
        case "union":
            branches = [draw(typed(names, 0)) for _ in range(draw(st.integers(1, 3)))]
            index = draw(st.integers(0, len(branches) - 1))
            return [schema for schema, _ in branches], number(index) + branches[index][1]
    names.append(name)
    fields = [draw(typed(names, depth - 1)) for _ in range(draw(st.integers(0, 3)))]
    return record(name, **{f"f{at}": schema for at, (schema, _) in enumerate(fields)}), b"".join(v for _, v in fields)


@st.composite
def wrapped(draw: st.DrawFn, schema: Any, value: bytes) -> tuple[Any, bytes, str]:
    """A record somewhere inside which there is this value, and the path that leads to it."""
    names: list[str] = []
    path: list[str] = []
    for _ in range(draw(st.integers(0, 3))):
        match draw(st.sampled_from(["record", "map", "union"])):
            case "record":
                schema, value = draw(_in_record(names, schema, value))
                path.insert(0, "wanted")
            case "map":
                other = draw(st.sampled_from(["anything", "wante", "wanted2", ""]))
                entries = [string("wanted") + value]
                entries.insert(draw(st.integers(0, 1)), string(other) + value)
                schema, value = {"type": "map", "values": schema}, draw(blocks(entries))
                path.insert(0, "wanted")
            case "union" if not isinstance(schema, list):
                schema, value = ["null", schema], b"\x02" + value
    schema, value = draw(_in_record(names, schema, value))
    return schema, value, ".".join(["wanted", *path])


@st.composite
def _in_record(draw: st.DrawFn, names: list[str], schema: Any, value: bytes) -> tuple[Any, bytes]:
    before = [draw(typed(names)) for _ in range(draw(st.integers(0, 2)))]
    behind = [draw(typed(names)) for _ in range(draw(st.integers(0, 2)))]
    names.append(name := f"T{len(names)}")
    fields = [
        *((f"b{at}", each) for at, (each, _) in enumerate(before)),
        ("wanted", schema),
        *((f"a{at}", each) for at, (each, _) in enumerate(behind)),
    ]
    return record(name, **dict(fields)), b"".join([*(v for _, v in before), value, *(v for _, v in behind)])
