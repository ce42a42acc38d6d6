"""CloudEvents 1.0 by the protocol binding for Kafka: which records are ones, what is in them, headers of new ones. Pure.

https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/kafka-protocol-binding.md
"""

import base64
import binascii
import re
from collections.abc import Sequence
from typing import Any, Final, Literal, NamedTuple
from urllib.parse import quote

import orjson

Headers = Sequence[tuple[str, bytes | None]]
Mode = Literal["binary", "structured"]

PREFIX: Final = "ce_"
VERSION: Final = "1.0"
RESULT_TYPE: Final = "sentiment-worker.result"
STRUCTURED: Final = b"application/cloudevents"
_CONTENT_TYPES: Final = ("content-type", "Content-Type")
_SHORTEST: Final = len(STRUCTURED)
_SIGNS: Final = frozenset({"ce_specversion", *_CONTENT_TYPES})
# Of the input's extensions: what places a record, and the trace that it belongs to
_KEPT: Final = frozenset({"ce_partitionkey", "ce_traceparent", "ce_tracestate"})
_TOKEN: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[{}\[\]:,]', re.DOTALL)


class Malformed(Exception):
    """It says that it is a CloudEvent, and is none that can be read; the message holds nothing of it."""


class CloudEvent(NamedTuple):
    """An event's id and its data: bytes of a media type (``""`` where none is named), or what was JSON already."""

    id: str
    media_type: str
    data: Any


NO_DATA: Final = object()


def mode(headers: Headers) -> Mode | None:
    """How a record is a CloudEvent, if it is one: by its content type, else by ``ce_specversion``."""
    found: Mode | None = None
    for name, value in headers:
        if name in _SIGNS:
            if name == "ce_specversion":
                found = "binary"
            elif value and len(value) >= _SHORTEST and value[:_SHORTEST].lower() == STRUCTURED:
                return "structured"
    return found


def binary(headers: Headers, value: bytes) -> CloudEvent:
    """Attributes in the headers, data in the value. Raises Malformed."""
    attributes = {name: _text(written) for name, written in headers if name.startswith(PREFIX)}
    id = _checked({name.removeprefix(PREFIX): written for name, written in attributes.items()})
    return CloudEvent(id, _media_type(_content_type(headers)), value)


def look_at_format(headers: Headers) -> None:
    """Raises Malformed for a structured event that is written in something else than JSON."""
    media_type = _media_type(_content_type(headers))
    if media_type.startswith("application/cloudevents-batch"):
        raise Malformed("a batch of events in one record is not of the binding for Kafka")
    if media_type != "application/cloudevents+json":
        raise Malformed("a structured event is read as JSON alone")


def structured(fields: dict[str, Any]) -> CloudEvent:
    """All in the value, which is ``fields``; ``data`` is NO_DATA where there is none. Raises Malformed."""
    id = _checked(fields)
    content_type = fields.get("datacontenttype") or "application/json"
    if not isinstance(content_type, str):
        raise Malformed("the attribute datacontenttype is not a string")
    if fields.get("data_base64") is None:
        return CloudEvent(id, _media_type(content_type), fields.get("data", NO_DATA))
    if fields.get("data") is not None:
        raise Malformed("the event has both data and data_base64")
    try:
        data = base64.b64decode(fields["data_base64"], validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise Malformed("data_base64 is not Base64") from None
    return CloudEvent(id, _media_type(content_type), data)


def is_json(media_type: str) -> bool:
    return media_type.endswith(("/json", "+json"))


def is_text(media_type: str) -> bool:
    return media_type.startswith("text/") and not is_json(media_type)


def end_of_data(value: bytes) -> int:
    """Where the last brace of the object ``data`` is, in a structured event; of several the last, as readers of JSON do."""
    depth, end = 0, -1
    is_data = False
    name = b""
    for token in _TOKEN.finditer(value):
        word = token[0]
        if word in (b"{", b"["):
            depth += 1
        elif word in (b"}", b"]"):
            depth -= 1
            end = token.start() if depth == 1 and is_data else end
        elif depth == 1 and word == b":":
            is_data = orjson.loads(name) == "data"
        elif depth == 1 and word == b",":
            is_data = False
        elif depth == 1 and not is_data:
            name = word
    return end


def source_of(group_id: str) -> bytes:
    """The attribute ``source`` of a group's results: a URI reference."""
    return f"/sentiment-worker/{quote(group_id, safe='')}".encode()


def without_attributes(headers: Headers) -> list[tuple[str, bytes | None]]:
    """The headers of a record without content type and without the attributes of the event that it may be."""
    return [
        header
        for header in headers
        if (not header[0].startswith(PREFIX) or header[0] in _KEPT) and header[0].lower() != "content-type"
    ]


def attributes(id: str, source: bytes, subject: str, time: str) -> list[tuple[str, bytes | None]]:
    """The headers of a result in binary mode. A subject may not be empty."""
    headers: list[tuple[str, bytes | None]] = [
        ("ce_specversion", VERSION.encode()),
        ("ce_id", id.encode()),
        ("ce_source", source),
        ("ce_type", RESULT_TYPE.encode()),
        ("ce_time", time.encode()),
    ]
    if subject:
        headers.append(("ce_subject", subject.encode()))
    headers.append(("content-type", b"application/json"))
    return headers


def _checked(attributes: dict[str, Any]) -> str:
    """The id of an event whose required attributes are all there."""
    if attributes.get("specversion") != VERSION:
        raise Malformed(f"the attribute specversion is not {VERSION}")
    for name in ("id", "source", "type"):
        if not isinstance(attributes.get(name), str) or not attributes[name]:
            raise Malformed(f"the attribute {name} is missing or empty")
    id: str = attributes["id"]
    return id


def _content_type(headers: Headers) -> str:
    """The last one, if it is named at all."""
    found = [value for name, value in headers if name in _CONTENT_TYPES and value]
    return found[-1].decode(errors="replace") if found else ""


def _media_type(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def _text(value: bytes | None) -> str | None:
    if value is None:
        return None
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise Malformed("an attribute is not UTF-8") from None
