"""CloudEvents 1.0 in Kafka records: telling which records are ones, reading them, and the headers of new ones. Pure.

The protocol binding for Kafka says how:
https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/kafka-protocol-binding.md
"""

import base64
import binascii
import re
from typing import Any, Final, Literal, NamedTuple
from urllib.parse import quote

import orjson

from worker.core.events import Headers

Mode = Literal["binary", "structured"]

PREFIX: Final = "ce_"
VERSION: Final = "1.0"
RESULT_TYPE: Final = "sentiment-worker.result"
STRUCTURED: Final = b"application/cloudevents"
_CONTENT_TYPES: Final = ("content-type", "Content-Type")
_SHORTEST: Final = len(STRUCTURED)
_MODE_HEADERS: Final = frozenset({"ce_specversion", *_CONTENT_TYPES})
# A result keeps two extensions of its input: the key that chooses its partition, and the trace that it belongs to.
_KEPT: Final = frozenset({"ce_partitionkey", "ce_traceparent", "ce_tracestate"})
_TOKEN: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[{}\[\]:,]', re.DOTALL)


class InvalidCloudEvent(Exception):
    """A record says that it is a CloudEvent, and cannot be read as one; the message holds nothing of it."""


class CloudEvent(NamedTuple):
    """The id and the data of an event.

    The data is bytes of ``media_type``, which is empty where the event names none, or what has been read from JSON already.
    """

    id: str
    media_type: str
    data: Any


NO_DATA: Final = object()


def mode(headers: Headers) -> Mode | None:
    """How a record holds a CloudEvent; None if it holds none. Its content type tells, else the header ``ce_specversion``."""
    by_header: Mode | None = None
    for name, value in headers:
        if name in _MODE_HEADERS:
            if name == "ce_specversion":
                by_header = "binary"
            elif value and len(value) >= _SHORTEST and value[:_SHORTEST].lower() == STRUCTURED:
                return "structured"
    return by_header


def read_binary(headers: Headers, value: bytes) -> CloudEvent:
    """The event that has its attributes in the headers and its data in the value. Raises InvalidCloudEvent."""
    attributes = {name: _text(written) for name, written in headers if name.startswith(PREFIX)}
    id = _checked_id({name.removeprefix(PREFIX): written for name, written in attributes.items()})
    return CloudEvent(id, _media_type(_content_type(headers)), value)


def check_format(headers: Headers) -> None:
    """Raises InvalidCloudEvent for a structured event in another format than JSON."""
    media_type = _media_type(_content_type(headers))
    if media_type.startswith("application/cloudevents-batch"):
        raise InvalidCloudEvent("a batch of events in one record is not of the binding for Kafka")
    if media_type != "application/cloudevents+json":
        raise InvalidCloudEvent("a structured event is read as JSON alone")


def read_structured(fields: dict[str, Any]) -> CloudEvent:
    """The event that a value's JSON ``fields`` hold; its data is NO_DATA where it has none. Raises InvalidCloudEvent."""
    id = _checked_id(fields)
    content_type = fields.get("datacontenttype") or "application/json"
    if not isinstance(content_type, str):
        raise InvalidCloudEvent("the attribute datacontenttype is not a string")
    if fields.get("data_base64") is None:
        return CloudEvent(id, _media_type(content_type), fields.get("data", NO_DATA))
    if fields.get("data") is not None:
        raise InvalidCloudEvent("the event has both data and data_base64")
    try:
        data = base64.b64decode(fields["data_base64"], validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise InvalidCloudEvent("data_base64 is not Base64") from None
    return CloudEvent(id, _media_type(content_type), data)


def is_json(media_type: str) -> bool:
    return media_type.endswith(("/json", "+json"))


def is_avro(media_type: str) -> bool:
    return media_type == "avro/binary" or media_type.endswith(("/avro", "+avro"))


def is_text(media_type: str) -> bool:
    return media_type.startswith("text/") and not is_json(media_type)


def end_of_data(value: bytes) -> int:
    """The offset of the brace that closes the object ``data`` of a structured event.

    Where the name ``data`` stands there several times, it is the last one's, as readers of JSON have it.
    """
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
    """The attribute ``source`` of the results of a consumer group: a URI reference."""
    return f"/sentiment-worker/{quote(group_id, safe='')}".encode()


def without_attributes(headers: Headers) -> list[tuple[str, bytes | None]]:
    """A record's headers without the content type, and without most attributes of the event that it may be."""
    return [
        header
        for header in headers
        if (not header[0].startswith(PREFIX) or header[0] in _KEPT) and header[0].lower() != "content-type"
    ]


def result_headers(id: str, source: bytes, subject: str, time: str) -> list[tuple[str, bytes | None]]:
    """The headers that make a result a CloudEvent in binary mode. An empty subject is left out, for it may not be empty."""
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


def _checked_id(attributes: dict[str, Any]) -> str:
    """The id of an event that has all required attributes. Raises InvalidCloudEvent."""
    if attributes.get("specversion") != VERSION:
        raise InvalidCloudEvent(f"the attribute specversion is not {VERSION}")
    for name in ("id", "source", "type"):
        if not isinstance(attributes.get(name), str) or not attributes[name]:
            raise InvalidCloudEvent(f"the attribute {name} is missing or empty")
    id: str = attributes["id"]
    return id


def _content_type(headers: Headers) -> str:
    """The last content type of the headers; empty where there is none."""
    values = [value for name, value in headers if name in _CONTENT_TYPES and value]
    return values[-1].decode(errors="replace") if values else ""


def _media_type(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def _text(value: bytes | None) -> str | None:
    if value is None:
        return None
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise InvalidCloudEvent("an attribute is not UTF-8") from None
