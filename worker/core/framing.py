"""Confluent's framing, in which clients of a schema registry write values: a zero byte, a schema's id, the value. Pure.

https://docs.confluent.io/platform/current/schema-registry/fundamentals/serdes-develop/index.html#wire-format
"""

from typing import Final

FRAME_BYTES: Final = 5
MAX_ID: Final = 2**31 - 1  # ids are signed integers of 32 bits


def frame(id: int) -> bytes:
    """What stands in front of a value with the schema of this id."""
    return b"\0" + id.to_bytes(4, "big")


def is_framed(value: bytes) -> bool:
    return value[:1] == b"\0" and len(value) >= FRAME_BYTES


def schema_id(value: bytes) -> int:
    """The id in the frame that a value begins with."""
    return int.from_bytes(value[1:FRAME_BYTES], "big")


def without_frame(value: bytes) -> bytes:
    """What stands behind the frame; a value without one as it is. No JSON begins with a zero byte."""
    return value[FRAME_BYTES:] if is_framed(value) else value
