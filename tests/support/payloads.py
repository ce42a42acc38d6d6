"""Hostile records, made from a seed, and an oracle that says what has to become of each.

The oracle shares nothing with the worker: it has the standard library's JSON reader, made strict, and rules of its own.
"""

import json
import os
import random
import re
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from tests.support.topics import Headers, Record

PAYLOADS: Final = int(os.environ.get("HOSTILE_PAYLOADS", "1500"))  # of one test; `make fuzz` takes 10,000
MAX_TEXT_CHARS: Final = 100_000
MAX_VALUES: Final = 100_000  # commas and opening brackets
BRACKETS: Final = re.compile(r"[\[\]{}]")
STRINGS: Final = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|$)', re.DOTALL)
DEEPEST: Final = 1_024  # levels of JSON that are read
MEGABYTE: Final = 1_000_000
RESULT, TOMBSTONE, SKIPPED = "result", "tombstone", "skipped"


@dataclass(frozen=True)
class Verdict:
    """What becomes of a record: one of the above or a dead letter's reason. Of a result, its text and its id."""

    outcome: str
    text: str = ""
    id: str | None = None  # None: that of its place


# --- The oracle ---


class _Digits(str):
    """An integer, as it is written."""

    __slots__ = ()


class _NoJson(Exception):
    pass


def verdict(record: Record, input_format: str, output_mode: str) -> Verdict:
    """What the worker, with these settings and defaults else, has to make of a record."""
    if record.value is None:
        return Verdict(SKIPPED if record.key is None else TOMBSTONE)
    if input_format == "json" and sum(byte in b",[{" for byte in record.value) > MAX_VALUES:
        return Verdict("too_large")
    try:
        string = record.value.decode()
    except UnicodeDecodeError:
        return Verdict("invalid_utf8")
    if input_format == "text":
        return _of_text(string, _header_id(record))
    try:
        fields = strictly_read(string)
    except _NoJson:
        return Verdict("invalid_json")
    if type(fields) is not dict:
        return Verdict("not_an_object")
    if "text" not in fields:
        return Verdict("missing_text")
    if type(fields["text"]) is not str:
        return Verdict("text_not_string")
    id = fields.get("id")
    found = _of_text(fields["text"], str(id) if type(id) in (str, _Digits) else _header_id(record))
    if found.outcome == RESULT and output_mode == "enrich" and "sentiment" in fields:
        return Verdict("field_exists")
    return found


def _of_text(text: str, id: str | None) -> Verdict:
    if len(text) > MAX_TEXT_CHARS:
        return Verdict("too_large")
    if all(map(_is_invisible, text)):
        return Verdict("empty_text")
    return Verdict(RESULT, text, id)


def _is_invisible(char: str) -> bool:
    category = unicodedata.category(char)
    return char.isspace() or category in ("Cc", "Cf", "Mn", "Me") or char in "\u115f\u1160\u3164\uffa0"


def _header_id(record: Record) -> str | None:
    return next(
        (value.decode(errors="replace") for name, value in record.headers if name == "event.id" and value), None
    )


def strictly_read(string: str) -> Any:
    """JSON as RFC 8259 has it, at most so deep, with Unicode that can be written again. Raises _NoJson."""
    if _depth(string) > DEEPEST:
        raise _NoJson
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20 * DEEPEST)
    try:
        fields = json.loads(
            string,
            parse_int=_Digits,
            parse_float=_not_read,
            parse_constant=_refused,
            object_pairs_hook=_whole_pairs,
        )
        _refuse_half_pairs(fields)
    except ValueError:
        raise _NoJson from None
    finally:
        sys.setrecursionlimit(limit)
    return fields


def _not_read(_: str) -> float:
    return 0.5


def _refused(name: str) -> None:
    raise ValueError(name)


def _whole_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The last of what is there twice, but none may hold half of a surrogate pair."""
    for name, value in pairs:
        name.encode()
        _refuse_half_pairs(value)
    return dict(pairs)


def _refuse_half_pairs(value: Any) -> None:
    """Of a string, or of those in a list of lists; objects have been looked at when they were read."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            one.encode()
        elif isinstance(one, list):
            waiting.extend(one)


def _depth(string: str) -> int:
    depth = deepest = 0
    for bracket in BRACKETS.findall(STRINGS.sub("", string)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


# --- The generator ---

Make = Callable[[random.Random], bytes]
WHITE: Final = " \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2000\u2003\u2028\u2029\u202f\u205f\u3000"
SPECIAL: Final = (
    "\0\x01\x08\x1b\x7f\u200b\u200c\u200d\u2060\ufeff\u202a\u202b\u202e\u2066\u2069\u061c\ufffd\ufffe\uffff"
)
COMBINING: Final = "".join(chr(code) for code in range(0x300, 0x370)) + "\u0591\u064b\u0e31\u20dd\ufe0f\U0001f3fb"
RIGHT_TO_LEFT: Final = "אבגדהוזחטيكلمنوهى܀ݐߊ\U0001e900"
WORDS: Final = [
    "плохо",
    "хорошо",
    "никогда",
    "больше",
    "не",
    "буду",
    "👍",
    "ok",
    "text",
    "id",
    "null",
    "漢字",
    "ﷺ",
    "İstanbul",
    "ǅ",
    "ß",
    "1e999",
    "-0",
    "{}",
    "\\",
    '"',
    "'",
    "<b>",
    "${x}",
    "%s",
]
ODD_NUMBERS: Final = [
    "-0",
    "-0.0",
    "0.0",
    "0e0",
    "1e999",
    "-1e999",
    "1E+400",
    "1e-999",
    "2e308",
    "0e999999999",
    "9007199254740993",
    "18446744073709551615",
    "18446744073709551616",
    "-9223372036854775808",
    "-9223372036854775809",
    "1.0",
    "1.5",
    "123456789012345678901234567890",
]
WRONG_NUMBERS: Final = [
    "01",
    "1.",
    ".5",
    "+1",
    "1e",
    "1e+",
    "--",
    "-",
    "0x10",
    "1_000",
    "NaN",
    "Infinity",
    "-Infinity",
    "١",
    "1e999.5",
    "--1e999",
    "01e999",
    "1e999e9",
    "nan",
    "inf",
]
BOMS: Final = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\xff\xfe\0\0")


def records(seed: int, count: int) -> list[Record]:
    """``count`` records, always the same of a seed; some are as large as a topic takes them by default."""
    rng = random.Random(seed)
    large = min(count, 2 * len(LARGE))
    made = [_record(rng, rng.choice(KINDS)(rng)) for _ in range(count - large)]
    made += [_record(rng, LARGE[number % len(LARGE)]) for number in range(large)]
    rng.shuffle(made)
    return made


def _record(rng: random.Random, made: bytes) -> Record:
    key = rng.choice((None, b"", b"key %d" % rng.randrange(50), rng.randbytes(rng.randrange(20))))
    value = None if rng.random() < 0.02 else made
    headers = _headers(rng) if len(made) < MEGABYTE // 2 else ()
    return Record(value, key, headers, rng.choice((0, 1_700_000_000_123)))


def _headers(rng: random.Random) -> Headers:
    choice = rng.random()
    if choice < 0.7:
        return ()
    if choice < 0.705:
        return (("gigantic", rng.randbytes(300_000)),)
    if choice < 0.71:
        return tuple((f"h{number}", b"") for number in range(3_000))
    odd = text(rng).replace("\0", "")  # the tests' own client ends a name there
    name = rng.choice(("event.id", "Content-Type", "error.reason", "source.offset", "", odd, "trace"))
    return ((name, rng.choice((None, b"", rng.randbytes(8), text(rng).encode()))),) * rng.randrange(1, 3)


def text(rng: random.Random) -> str:
    """A text of any kind, nearly always with something to score."""
    length = rng.choice((1, 2, 5, 20, 20, 20, 100, 600))
    kind = rng.randrange(8)
    if kind == 0:
        return "".join(_letter(rng) for _ in range(length))
    if kind == 1:
        return "".join(rng.choice("еиa") + "".join(rng.choices(COMBINING, k=rng.randrange(9))) for _ in range(length))
    if kind == 2:
        return "".join(rng.choices(SPECIAL, k=length))
    if kind == 3:
        return "".join(rng.choices(RIGHT_TO_LEFT + " ab\u202e", k=length))
    if kind == 4:
        return "".join(rng.choices(WHITE, k=length))
    if kind == 5:
        return unicodedata.normalize(rng.choice(("NFC", "NFD", "NFKD")), " ".join(rng.choices(WORDS, k=length)))
    if kind == 6:
        return rng.choice(WORDS) * length
    return " ".join(rng.choices(WORDS, k=length))


def _letter(rng: random.Random) -> str:
    """A character of any plane, assigned or not, but no half of a surrogate pair."""
    code = rng.randrange(17) << 16 | rng.randrange(0x10000)
    return chr(code) if not 0xD800 <= code < 0xE000 else " "


def _string(rng: random.Random) -> str:
    """A JSON string, as it is written: plain or escaped, now and then half of a surrogate pair or what is not JSON."""
    choice = rng.random()
    if choice < 0.03:
        return rng.choice(
            ('"\\ud800"', '"\\udc00 a"', '"a \\ud83d"', '"\\ud800\\ud800"', '"\\x41"', '"\\u12"', '"\t"', '"\0"', '"')
        )
    return json.dumps(text(rng), ensure_ascii=choice < 0.3)


def _value(rng: random.Random, depth: int = 0) -> str:
    """A JSON value of any shape, as it is written; seldom a wrong one."""
    kind = rng.randrange(10 if depth < 4 else 7)
    if kind == 0:
        return rng.choice(ODD_NUMBERS)
    if kind == 1:
        return str(rng.randrange(-(10 ** rng.randrange(1, 40)), 10 ** rng.randrange(1, 40)))
    if kind == 2:
        return rng.choice(("true", "false", "null"))
    if kind < 7:
        return rng.choice(WRONG_NUMBERS) if rng.random() < 0.01 else _string(rng)
    inner = [_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 7:
        return f"[{','.join(inner)}]"
    return "{" + ",".join(f"{_string(rng)}:{one}" for one in inner) + "}"


def _event(rng: random.Random) -> bytes:
    """Nearly always a JSON object with a text, whatever else it holds, some names twice."""
    fields = [("text", _string(rng))]
    if rng.random() < 0.5:
        fields.append(("id", _value(rng, 4)))
    if rng.random() < 0.1:
        fields.append((rng.choice(("sentiment", "sentimen\\u0074", "Sentiment", "text", "id")), _value(rng)))
    if rng.random() < 0.1:
        fields.append(("text", _value(rng)))
    for _ in range(rng.randrange(3)):
        fields.append((rng.choice(("a", "a", "meta", "tex", "text ", "\\u0000")), _value(rng)))
    rng.shuffle(fields)
    space = rng.choice(("", "", " ", "\n\t", "\r\n"))
    own = (
        space + "{" + f"{space},{space}".join(f'"{name}"{space}:{space}{value}' for name, value in fields) + space + "}"
    )
    return (own + space * rng.randrange(3)).encode()


def _broken(rng: random.Random) -> bytes:
    """An event with some bytes changed, lost, doubled or added."""
    value = bytearray(_event(rng))
    for _ in range(rng.randrange(1, 4)):
        place = rng.randrange(len(value) + 1)
        choice = rng.randrange(5)
        if choice == 0:
            value[place : place + 1] = rng.randbytes(1)
        elif choice == 1:
            del value[place : place + rng.randrange(1, 9)]
        elif choice == 2:
            value[place:place] = value[: rng.randrange(1, 9)]
        elif choice == 3:
            value[place:place] = rng.choice(
                (*BOMS, b"}", b"{", b'"', b"\\", b"\0", b",", b"]", b"\xed\xa0\x80", b"\xc0\x80")
            )
        else:
            del value[place:]
    return bytes(value)


def _nested(rng: random.Random) -> bytes:
    depth = rng.choice((2, 50, 900, DEEPEST - 2, DEEPEST - 1, DEEPEST, DEEPEST + 1, 5_000, 50_000))
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
    inner = opening * depth + rng.choice(("1", "1e999", '""')) + closing * (depth - (rng.random() < 0.1))
    return rng.choice((f'{{"text":"глубоко","id":-0,"x":{inner}}}', f'{{"x":{inner},"text":"и ещё"}}', inner)).encode()


def _huge_number(rng: random.Random) -> bytes:
    digits = "".join(rng.choices("123456789", k=rng.choice((20, 308, 309, 400, 4_300, 4_301, 20_000))))
    number = rng.choice(
        (digits, f"-{digits}", f"{digits}.5", f"0.{digits}", f"{digits}e5", f"1e{digits}", f"{digits[:250]}e99")
    )
    return (
        f'{{"id":{rng.choice((number, "0", "7"))},"text":{rng.choice((_string(rng), number))},"n":[{number}]}}'.encode()
    )


def _another_encoding(rng: random.Random) -> bytes:
    codec = rng.choice(("cp1251", "koi8-r", "utf-16", "utf-16-le", "utf-32", "utf-7", "shift-jis"))
    return rng.choice((_event(rng).decode(), text(rng))).encode(codec, errors="ignore")


def _surrogates_in_bytes(rng: random.Random) -> bytes:
    return f'{{"text":"a{chr(rng.randrange(0xD800, 0xE000))}"}}'.encode(errors="surrogatepass")


KINDS: Final[tuple[Make, ...]] = (
    *[_event] * 12,
    *[lambda rng: text(rng).encode()] * 4,
    *[_broken] * 4,
    lambda rng: _value(rng).encode(),
    lambda rng: rng.randbytes(rng.randrange(300)),
    lambda rng: rng.choice(BOMS) + _event(rng),
    lambda rng: rng.choice(
        (b"", b" ", b"\0", b"\n \t", b"\xc2\xa0", b"null", b"{}", b"[]", b'""', b'{"text":""}', b'{"":1}')
    ),
    _nested,
    _huge_number,
    _another_encoding,
    _surrogates_in_bytes,
)
LARGE: Final[tuple[bytes, ...]] = (
    json.dumps({"text": "а" * MAX_TEXT_CHARS}, ensure_ascii=False).encode(),
    json.dumps({"text": "а" * (MAX_TEXT_CHARS + 1)}).encode(),
    json.dumps({"text": "е\u0301" * (MAX_TEXT_CHARS // 2)}, ensure_ascii=False).encode(),
    json.dumps({"text": "😀" * MAX_TEXT_CHARS}, ensure_ascii=False).encode(),
    ("слово " * (MAX_TEXT_CHARS // 6)).encode(),
    ("\u200b" * MAX_TEXT_CHARS).encode(),
    b"x" * MEGABYTE,
    b" " * MEGABYTE,
    b"\xff" * MEGABYTE,
    b'{"text":"' + b"y" * (MEGABYTE - 20) + b'"}',
    b'{"text":"a","id":' + b"9" * (MEGABYTE - 30) + b"}",
    b'{"text":"a","id":0,"x":[' + b"1," * (MEGABYTE // 2 - 30) + b"-0]}",
    b'{"text":"a","x":[' + b"{}," * (MEGABYTE // 3 - 30) + b"1e999]}",
    b"[" * MEGABYTE,
)
