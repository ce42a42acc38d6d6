"""JSON objects from the bytes of a record, numbers of any size among them, and the fields in them. Pure."""

import codecs
import re
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Any, Final

import orjson

from worker.core.events import Failure, Reason

MOST_VALUES: Final = 100_000  # in one record: each becomes an object of Python's, while all else waits
MISSING: Final = object()
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
_FRAME: Final = 5  # bytes: a zero, and a schema's id in a schema registry


def failure_to_decode(reason: Reason, message: str) -> Failure:
    return Failure("decode", reason, message)


_TOO_MUCH: Final = failure_to_decode("too_large", f"the value has more than {MOST_VALUES} commas and opening brackets")


def may_hold_too_much(value: bytes) -> bool:
    """Each value but the first stands behind a comma or a bracket. Those in strings count too: it is quick, not exact."""
    return len(value) > MOST_VALUES and sum(map(value.count, (b",", b"[", b"{"))) > MOST_VALUES


def loads(value: bytes) -> Any:
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


def loads_with_digits(value: bytes) -> Any:
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


def finder(path: list[str]) -> Callable[[dict[str, Any]], Any]:
    """Finds a field of an object by its path; answers with MISSING where it is not."""
    if len(path) > 1:
        return partial(look_up, path=path)
    return lambda fields: fields.get(path[0], MISSING)


def getter(path: list[str]) -> Callable[[Any], Any]:
    """As ``finder``, but raises KeyError where there is no such field, and is native code for a path of one name."""
    return itemgetter(path[0]) if len(path) == 1 else partial(_got, path=path)


def _got(fields: Any, path: list[str]) -> Any:
    found = look_up(fields, path)
    if found is MISSING:
        raise KeyError
    return found


def look_up(fields: Any, path: list[str]) -> Any:
    for name in path:
        if not isinstance(fields, dict) or name not in fields:
            return MISSING
        fields = fields[name]
    return fields


def is_null(fields: Any, path: list[str]) -> bool:
    """Whether the value at a path is null, or one that it leads through."""
    for name in path:
        if not isinstance(fields, dict) or name not in fields:
            return False
        fields = fields[name]
        if fields is None:
            return True
    return False


def read_object(value: bytes) -> dict[str, Any] | Failure:
    """The fields of a JSON object, or why it is none that is read."""
    if may_hold_too_much(value):
        return _TOO_MUCH
    try:
        fields = loads(value)
    except orjson.JSONDecodeError as error:
        return _unreadable(value, error.pos)
    return (
        fields if type(fields) is dict else failure_to_decode("not_an_object", "the value is JSON, but not an object")
    )


def _unreadable(value: bytes, position: int) -> Failure:
    begin = _beginning(value)
    # Of a frame in front of JSON the id may be no UTF-8; that a producer's letters have one reason should not hang on it.
    is_framed = value.startswith(b"\0") and value[_FRAME:].lstrip().startswith((b"{", b"["))
    skipped = _FRAME if is_framed else 0
    try:
        value[skipped:].decode()
    except UnicodeDecodeError as error:
        return failure_to_decode("invalid_utf8", f"the value is not UTF-8 at byte {skipped + error.start}{begin}")
    return failure_to_decode("invalid_json", f"the value is not JSON at character {position}{begin}")


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
