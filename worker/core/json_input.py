"""JSON objects from the bytes of a record, with numbers of any size in them, and the values at a path. Pure."""

import codecs
import re
from collections.abc import Sequence
from operator import itemgetter
from typing import Any, Final

import orjson

from worker.core.events import Failure
from worker.core.framing import FRAME_BYTES, is_framed, schema_id
from worker.reasons import Reason

MAX_VALUES: Final = 100_000  # of one record: each becomes a Python object, while the event loop waits
MISSING: Final = object()
# A number that is too large for a float has 200 digits or an exponent of three: all others stay below 1e299.
_LARGE_NUMBER: Final = re.compile(rb"(?<!\d)\d{200}|[eE]\+?\d{3}")
# Matches one of two things. Either strings with what stands between them, so that nothing in a string is taken for a
# number; an unfinished string reaches to the end. Or a number that may be too large for 64 bits or for a float, or -0:
# its whole part is group 1, the rest group 2. Possessive quantifiers, and many strings at once, keep it linear and quick.
_STRING: Final = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?+'
_STRINGS_OR_NUMBER: Final = re.compile(
    rb"%b(?:[^\"0-9-]*+%b)*+"
    rb"|(?<![\d.eE+-])(?=-0|-?\d{19}|-?\d++(?:\.\d++)?+[eE]\+?+\d{3})"
    rb"(-?+(?:0|[1-9]\d*+))((?:\.\d++)?+(?:[eE][+-]?+\d++)?+)" % (_STRING, _STRING),
    re.DOTALL,
)
_SAFE_DIGITS: Final = 18  # an integer of so many digits fits into 64 bits


class FieldPath:
    """Where a value is in a JSON object: a name, or names joined by dots that lead through objects."""

    def __init__(self, dotted: str) -> None:
        self._dotted = dotted
        self._names = dotted.split(".")
        self._get_quickly = self.get if "." in dotted else itemgetter(dotted)

    def __str__(self) -> str:
        return self._dotted

    def get_all(self, objects: Sequence[dict[str, Any]]) -> list[Any]:
        """The values of N objects, at a third of the cost of ``get``. It may raise KeyError where one is missing."""
        return list(map(self._get_quickly, objects))

    def is_null(self, fields: Any) -> bool:
        """Whether the value is null, or one that the path leads through is."""
        for name in self._names:
            if type(fields) is not dict:
                return False
            fields = fields.get(name, MISSING)
            if fields is None:
                return True
        return False

    def get(self, fields: Any) -> Any:
        """The value; MISSING where the object has none there."""
        for name in self._names:
            if type(fields) is not dict:
                return MISSING
            fields = fields.get(name, MISSING)
        return fields


def read_object(value: bytes) -> dict[str, Any] | Failure:
    """The fields of a JSON object, or why there are none. A number that is too large for a float is read as 1e300."""
    if len(value) > MAX_VALUES and _has_too_many_values(value):
        return _TOO_MANY_VALUES
    try:
        fields = orjson.loads(value)
    except orjson.JSONDecodeError as error:
        fields = _read_with_large_numbers(value)
        if fields is MISSING:
            return _unreadable(value, error.pos)
    if type(fields) is not dict:
        return decode_failure("not_an_object", "the value is JSON, but not an object")
    return fields


def read_with_digits(value: bytes) -> Any:
    """The value of valid JSON, with a string of digits for each integer of more than 18 digits and for each -0.

    orjson reads the former as floats where they exceed 64 bits, and the latter as 0.
    """
    return orjson.loads(_STRINGS_OR_NUMBER.sub(_quoted, value))


def decode_failure(reason: Reason, message: str) -> Failure:
    return Failure("decode", reason, message)


_TOO_MANY_VALUES: Final = decode_failure(
    "too_large", f"the value has more than {MAX_VALUES} commas and opening brackets"
)


def _has_too_many_values(value: bytes) -> bool:
    """Each value but the first follows a comma or a bracket. Those in strings count too: the check is quick, not exact."""
    return sum(map(value.count, (b",", b"[", b"{"))) > MAX_VALUES


def _read_with_large_numbers(value: bytes) -> Any:
    """What orjson refuses because a number is too large for a float, with a smaller one in its place; else MISSING."""
    if not _LARGE_NUMBER.search(value):
        return MISSING
    try:
        return orjson.loads(_STRINGS_OR_NUMBER.sub(_smaller, value))
    except orjson.JSONDecodeError:
        return MISSING


def _smaller(match: re.Match[bytes]) -> bytes:
    if match[1] is None or not _LARGE_NUMBER.search(match[0]):
        return match[0]
    return b"-1e300" if match[0].startswith(b"-") else b"1e300"


def _quoted(match: re.Match[bytes]) -> bytes:
    whole = match[1]
    if whole and not match[2] and (len(whole) > _SAFE_DIGITS or whole == b"-0"):
        return b'"%b"' % whole
    return _smaller(match)


def _unreadable(value: bytes, position: int) -> Failure:
    """Why a value is no JSON; orjson stopped at ``position``."""
    prefix = _known_prefix(value)
    # A schema id may be no UTF-8 by chance. Only what follows it is checked, so that all of a producer's dead letters
    # have the same reason.
    begin = FRAME_BYTES if is_framed(value) and value[FRAME_BYTES:].lstrip().startswith((b"{", b"[")) else 0
    try:
        value[begin:].decode()
    except UnicodeDecodeError as error:
        return decode_failure("invalid_utf8", f"the value is not UTF-8 at byte {begin + error.start}{prefix}")
    return decode_failure("invalid_json", f"the value is not JSON at character {position}{prefix}")


def _known_prefix(value: bytes) -> str:
    """What a producer has put in front of the JSON, as the end of a sentence; empty where nothing is recognised."""
    if value.startswith(codecs.BOM_UTF8):
        return ": it begins with a byte order mark, which JSON has not"
    if is_framed(value) and len(value) > FRAME_BYTES:
        return (
            f": it begins with Confluent's framing, a zero byte and the id of a schema ({schema_id(value)}), which JSON has "
            "not"
        )
    return ""
