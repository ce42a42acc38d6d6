"""Values in Avro's binary encoding, read by the schema that they were written with, as far as they are wanted. Pure.

https://avro.apache.org/docs/1.12.0/specification/

Anyone may write the bytes, so nothing is allocated that they do not hold, arrays are skipped and never built, and recursion
ends. A library would build the whole of each value, and by a value of 20 kB fastavro's native recursion ends the process.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar

import orjson

MAX_ITEMS: Final = (
    100_000  # of the arrays and maps in one value, and blocks: the event loop waits while they are skipped
)
MAX_SHIFT: Final = 63  # of the last of a number's bytes: each has seven bits, and all together have 64
TOO_MANY_BITS: Final = "a number in it has more than 64 bits"
OTHER: Final = object()  # in place of a value that is no string, integer, object or null

Skip = Callable[[bytes, int], int]  # from where a value begins to where it ends
Read = Callable[[bytes, int], tuple[Any, int]]  # likewise, with the value
Answer = TypeVar("Answer")
Type = str | list[Any] | dict[str, Any]  # a primitive type's name, a union's branches, or a type with parts
Wanted = Mapping[str, "Wanted"]

_WIDTHS: Final = {"null": 0, "boolean": 1, "float": 4, "double": 8}
_PRIMITIVE: Final = frozenset({*_WIDTHS, "int", "long", "bytes", "string"})


class UnreadableSchema(Exception):
    """A schema is not one of Avro's; the message is half a sentence that says why."""


class InvalidAvro(Exception):
    """The bytes of a value do not fit its schema; the message is half a sentence that says why, and holds none of them."""


class TooLarge(Exception):
    """A value has more items than are skipped while the event loop waits, or is nested too deep; half a sentence."""


def wanted(paths: Iterable[str]) -> Wanted:
    """``["id", "payload.text"]`` → ``{"id": {}, "payload": {"text": {}}}``"""
    tree: dict[str, Any] = {}
    for path in paths:
        node = tree
        for name in path.split("."):
            node = node.setdefault(name, {})
    return tree


class AvroSchema:
    """Reads the values that were written with one schema.

    ``references`` has the texts of the schemas that it refers to by name, those that others refer to first. What ``wants``
    does not lead to is skipped. Raises UnreadableSchema.
    """

    def __init__(self, text: str, references: Sequence[str], wants: Wanted) -> None:
        self._items = 0
        try:
            types = _Types()
            for reference in references:
                types.resolve(orjson.loads(reference), "")
            root = types.resolve(orjson.loads(text), "")
            self._read = _Compiler(self._count).read(root, wants)
        except orjson.JSONDecodeError:
            raise UnreadableSchema("it is not JSON") from None
        except RecursionError:
            raise UnreadableSchema("it is nested too deep") from None

    def read(self, value: bytes, begin: int = 0) -> Any:
        """What is wanted of the value that begins at this byte and reaches to the end.

        A record is a dict of its wanted fields, a map one of its wanted keys; a union is what its branch is. Strings, enums
        and integers are themselves, null is None, and everything else is OTHER. Raises InvalidAvro and TooLarge.
        """
        self._items = 0
        try:
            found, end = self._read(value, begin)
        except IndexError:
            end, found = len(value) + 1, None
        except RecursionError:
            raise TooLarge("it is nested too deep") from None
        if end != len(value):
            raise InvalidAvro("it ends before its schema does" if end > len(value) else "it goes on behind its schema")
        return found

    def _count(self, items: int, left: int) -> None:
        """Is called before so many items are gone through, each of which takes at least one of the bytes that are left."""
        if items > left:
            raise InvalidAvro("an array or a map in it has more items than there are bytes left")
        self._items += items
        if self._items > MAX_ITEMS:
            raise TooLarge(f"it has more than {MAX_ITEMS} items of arrays and maps")


class _Types:
    """Replaces the names in schemas by the types that they stand for. A recursive type then holds itself."""

    def __init__(self) -> None:
        self._named: dict[str, dict[str, Any]] = {}

    def resolve(self, schema: Any, namespace: str) -> Type:
        if isinstance(schema, str):
            return schema if schema in _PRIMITIVE else self._find(schema, namespace)
        if isinstance(schema, list):
            return [self.resolve(each, namespace) for each in schema]
        kind = _part(schema, "type", object)
        if kind == "array":
            return {"type": kind, "items": self.resolve(_part(schema, "items", object), namespace)}
        if kind == "map":
            return {"type": kind, "values": self.resolve(_part(schema, "values", object), namespace)}
        if kind in ("record", "error", "enum", "fixed"):
            return self._define(schema, kind, namespace)
        return self.resolve(kind, namespace)  # such as {"type": "string", "logicalType": "uuid"}

    def _define(self, schema: dict[str, Any], kind: str, namespace: str) -> Type:
        name = _part(schema, "name", str)
        if "." in name:
            namespace = name.rpartition(".")[0]
        else:
            namespace = schema.get("namespace", namespace) or ""
            name = f"{namespace}.{name}" if namespace else name
        new = self._named[name] = {"type": kind}
        if kind == "enum":
            new["symbols"] = _part(schema, "symbols", list)
        elif kind == "fixed":
            new["size"] = max(0, _part(schema, "size", int))
        else:
            new["type"], new["fields"] = "record", []
            for field in _part(schema, "fields", list):
                new["fields"].append((_part(field, "name", str), self.resolve(_part(field, "type", object), namespace)))
        return new

    def _find(self, name: str, namespace: str) -> Type:
        for full in (name,) if "." in name else (f"{namespace}.{name}", name):
            if full in self._named:
                return self._named[full]
        raise UnreadableSchema("it names a type that it does not define")


class _Compiler:
    """Makes functions that skip or read values of types. ``count`` is called before they go through items."""

    def __init__(self, count: Callable[[int, int], None]) -> None:
        self._count = count
        self._widths: dict[int, int | None] = {}  # by the identity of a record's type
        self._skips: dict[int, Skip] = {}  # likewise
        self._reads: dict[tuple[int, int], Read] = {}  # likewise, and by that of what is wanted of it

    def width(self, type: Type) -> int | None:
        """How many bytes each value of a type takes; None where they differ."""
        if isinstance(type, str):
            return _WIDTHS.get(type)
        if isinstance(type, list) or type["type"] not in ("record", "fixed"):
            return None
        if type["type"] == "fixed":
            return int(type["size"])
        if id(type) not in self._widths:
            self._widths[id(type)] = None  # while it is looked at: of a type that holds itself
            widths = [self.width(field) for _, field in type["fields"]]
            self._widths[id(type)] = None if None in widths else sum(filter(None, widths))
        return self._widths[id(type)]

    def skip(self, type: Type) -> Skip:
        width = self.width(type)
        if width is not None:
            return lambda data, at: at + width
        if isinstance(type, list):
            return _union(list(map(self.skip, type)))
        if isinstance(type, str):
            return _skip_number if type in ("int", "long") else _skip_bytes
        kind = type["type"]
        if kind == "enum":
            return _skip_number
        if kind == "array":
            return self._skip_blocks(self.skip(type["items"]), self.width(type["items"]))
        if kind == "map":
            skip_value = self.skip(type["values"])
            return self._skip_blocks(lambda data, at: skip_value(data, _skip_bytes(data, at)), None)
        if id(type) not in self._skips:
            self._skips[id(type)] = self._later(type)
            self._skips[id(type)] = self._skip_record(type)
        return self._skips[id(type)]

    def _later(self, type: dict[str, Any]) -> Skip:
        """Skips a record by the function that it will have: while that is made, for a type that holds itself."""
        return lambda data, at: self._skips[id(type)](data, at)  # noqa: PLW0108 - it is not there yet

    def read(self, type: Type, wants: Wanted) -> Read:
        if isinstance(type, list):
            return _union([self.read(branch, wants) for branch in type])
        kind = type if isinstance(type, str) else type["type"]
        if kind == "null":
            return lambda data, at: (None, at)
        if kind == "string":
            return read_string
        if kind in ("int", "long"):
            return read_number
        if isinstance(type, dict):
            if kind == "enum":
                return _enum(type["symbols"])
            if kind == "record" and wants:
                place = id(type), id(wants)
                if place not in self._reads:
                    self._reads[place] = self._read_record(type, wants)
                return self._reads[place]
            if kind == "map" and wants:
                return self._read_map(type["values"], wants)
        skip = self.skip(type)
        return lambda data, at: (OTHER, skip(data, at))

    def _steps(self, type: dict[str, Any], wants: Wanted) -> list[tuple[str | None, Any]]:
        """A name and a Read for each wanted field; None and a Skip for those between, neighbours of fixed width as one."""
        steps: list[tuple[str | None, Any]] = []
        fixed = 0
        for name, field in type["fields"]:
            width = None if name in wants else self.width(field)
            if width is not None:
                fixed += width
                continue
            if fixed:
                steps.append((None, _fixed(fixed)))
                fixed = 0
            steps.append((name, self.read(field, wants[name])) if name in wants else (None, self.skip(field)))
        return [*steps, (None, _fixed(fixed))] if fixed else steps

    def _skip_record(self, type: dict[str, Any]) -> Skip:
        skips: list[Skip] = [skip for _, skip in self._steps(type, {})]
        if len(skips) == 1:  # then no record in records costs time without taking bytes, however deep they are
            return skips[0]

        def skip_record(data: bytes, at: int) -> int:
            for skip in skips:
                at = skip(data, at)
            return at

        return skip_record

    def _read_record(self, type: dict[str, Any], wants: Wanted) -> Read:
        steps = self._steps(type, wants)

        def read_record(data: bytes, at: int) -> tuple[dict[str, Any], int]:
            fields = {}
            for name, step in steps:
                if name is None:
                    at = step(data, at)
                else:
                    fields[name], at = step(data, at)
            return fields, at

        return read_record

    def _skip_blocks(self, skip_item: Skip, width: int | None) -> Skip:
        """Skips an array or a map: blocks of items, each behind their number, or behind that and their size."""

        def skip_blocks(data: bytes, at: int) -> int:
            while True:
                items, at = read_number(data, at)
                if items == 0:
                    return at
                self._count(items if items > 0 and width is None else 1, len(data) - at)
                if items < 0:
                    at = _skip_bytes(data, at)
                elif width is not None:
                    at += items * width
                else:
                    for _ in range(items):
                        at = skip_item(data, at)

        return skip_blocks

    def _read_map(self, values: Type, wants: Wanted) -> Read:
        reads = {name.encode(): (name, self.read(values, inner)) for name, inner in wants.items()}
        skip_value = self.skip(values)

        def read_map(data: bytes, at: int) -> tuple[dict[str, Any], int]:
            found: dict[str, Any] = {}
            while True:
                items, at = read_number(data, at)
                if items == 0:
                    return found, at
                if items < 0:
                    items = -items
                    _, at = _read_length(data, at)
                self._count(items, len(data) - at)
                for _ in range(items):
                    length, at = _read_length(data, at)
                    key, at = data[at : at + length], at + length
                    if key in reads:
                        name, read = reads[key]
                        found[name], at = read(data, at)
                    else:
                        at = skip_value(data, at)

        return read_map


def _part(schema: Any, name: str, kind: type) -> Any:
    part = schema.get(name) if isinstance(schema, dict) else None
    if part is None or not isinstance(part, kind):
        raise UnreadableSchema(f"a type in it has no {name}, or another kind of it than Avro's")
    return part


def read_number(data: bytes, at: int) -> tuple[int, int]:
    """The int or the long, which are encoded alike, that begins at an offset, and the offset behind it."""
    number = byte = data[at]
    at += 1
    if byte >= 0x80:
        number, shift = byte & 0x7F, 7
        while (byte := data[at]) >= 0x80:
            number |= (byte & 0x7F) << shift
            shift += 7
            at += 1
            if shift > MAX_SHIFT:
                raise InvalidAvro(TOO_MANY_BITS)
        number |= byte << shift
        at += 1
        if number >> 64:
            raise InvalidAvro(TOO_MANY_BITS)
    return (number >> 1) ^ -(number & 1), at


def _read_length(data: bytes, at: int) -> tuple[int, int]:
    length, at = read_number(data, at)
    if length < 0:
        raise InvalidAvro("a length in it is negative")
    return length, at


def read_string(data: bytes, at: int) -> tuple[str, int]:
    """The string that begins at an offset, and the offset behind it. Raises InvalidAvro and, as all of these, IndexError."""
    length, at = _read_length(data, at)
    try:
        return data[at : at + length].decode(), at + length
    except UnicodeDecodeError:
        raise InvalidAvro("a string in it is not UTF-8") from None


def _skip_number(data: bytes, at: int) -> int:
    end = at
    while data[end] >= 0x80:
        end += 1
    if 7 * (end - at) > MAX_SHIFT:
        raise InvalidAvro(TOO_MANY_BITS)
    return end + 1


def _skip_bytes(data: bytes, at: int) -> int:
    byte = data[at]
    if byte < 0x80 and not byte & 1:  # a length below 64, as most are: this is called for each field
        return at + 1 + (byte >> 1)
    length, at = _read_length(data, at)
    return at + length


def _fixed(width: int) -> Skip:
    return lambda data, at: at + width


def _union(branches: Sequence[Callable[[bytes, int], Answer]]) -> Callable[[bytes, int], Answer]:
    """A Skip or a Read, as the branches are."""

    count = len(branches)

    def branch(data: bytes, at: int) -> Answer:
        index, at = read_number(data, at)
        if not 0 <= index < count:
            raise InvalidAvro("it names a branch that its union does not have")
        return branches[index](data, at)

    return branch


def _enum(symbols: list[str]) -> Read:
    def read_enum(data: bytes, at: int) -> tuple[str, int]:
        index, at = read_number(data, at)
        if not 0 <= index < len(symbols):
            raise InvalidAvro("it names a symbol that its enum does not have")
        return symbols[index], at

    return read_enum
