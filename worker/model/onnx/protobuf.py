"""Writes ONNX's protobuf messages: the part of onnx.proto that the graphs built here need.

The field numbers are those of https://github.com/onnx/onnx/blob/main/onnx/onnx.proto. The package ``onnx`` does the
same, but takes 33 MB on disk with its dependencies, and 40 ms of each start.
"""

import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

IR_VERSION: Final = 9
FLOAT: Final = 1  # TensorProto.DataType
INT64: Final = 7
DATA_TYPES: Final = {"float32": FLOAT, "uint8": 2, "int8": 3, "int32": 6, "int64": INT64}
EXTERNAL: Final = 1  # TensorProto.DataLocation

Attribute = int | float | str | Sequence[int]


def node(
    op_type: str, inputs: Sequence[str], outputs: Sequence[str], domain: str, attributes: Mapping[str, Attribute]
) -> bytes:
    """A NodeProto."""
    return b"".join(
        [
            *(_text(1, name) for name in inputs),
            *(_text(2, name) for name in outputs),
            _text(4, op_type),
            *(_bytes(5, _attribute(name, value)) for name, value in attributes.items()),
            _text(7, domain),
        ]
    )


def tensor(name: str, values: NDArray[Any]) -> bytes:
    """A TensorProto that holds its values."""
    return _tensor_header(name, values) + _bytes(9, np.ascontiguousarray(values).tobytes())


def external_tensor(name: str, values: NDArray[Any]) -> bytes:
    """A TensorProto of these values' type and shape, whose values are given to the session beside the graph."""
    location = _text(1, "location") + _text(2, "beside the graph")
    return _tensor_header(name, values) + _bytes(13, location) + _number(14, EXTERNAL)


def value_info(name: str, data_type: int, shape: Sequence[str]) -> bytes:
    """A ValueInfoProto: an input or output of the graph, whose dimensions have these names."""
    dimensions = b"".join(_bytes(1, _text(2, dimension)) for dimension in shape)
    return _text(1, name) + _bytes(2, _bytes(1, _number(1, data_type) + _bytes(2, dimensions)))


def model(
    nodes: Sequence[bytes],
    initializers: Sequence[bytes],
    inputs: Sequence[bytes],
    outputs: Sequence[bytes],
    opsets: Mapping[str, int],
) -> bytes:
    """A ModelProto with one graph of these messages. ``opsets``: the version of each domain of operators."""
    graph = b"".join(
        [
            *(_bytes(1, message) for message in nodes),
            _text(2, "classifier"),
            *(_bytes(5, message) for message in initializers),
            *(_bytes(11, message) for message in inputs),
            *(_bytes(12, message) for message in outputs),
        ]
    )
    imports = (_bytes(8, _text(1, domain) + _number(2, version)) for domain, version in opsets.items())
    return _number(1, IR_VERSION) + _bytes(7, graph) + b"".join(imports)


def _attribute(name: str, value: Attribute) -> bytes:
    if isinstance(value, int):
        return _text(1, name) + _number(3, value) + _number(20, 2)
    if isinstance(value, float):
        return _text(1, name) + _tag(2, 5) + struct.pack("<f", value) + _number(20, 1)
    if isinstance(value, str):
        return _text(1, name) + _text(4, value) + _number(20, 3)
    return _text(1, name) + b"".join(_number(8, each) for each in value) + _number(20, 7)


def _tensor_header(name: str, values: NDArray[Any]) -> bytes:
    dimensions = b"".join(_number(1, size) for size in values.shape)
    return dimensions + _number(2, DATA_TYPES[values.dtype.name]) + _text(8, name)


def _number(field: int, value: int) -> bytes:
    return _tag(field, 0) + _varint(value)


def _text(field: int, value: str) -> bytes:
    return _bytes(field, value.encode())


def _bytes(field: int, value: bytes) -> bytes:
    return _tag(field, 2) + _varint(len(value)) + value


def _tag(field: int, wire_type: int) -> bytes:
    return _varint(field << 3 | wire_type)


def _varint(value: int) -> bytes:
    """The number in groups of seven bits, the lowest first; a negative one as 64 bits of two's complement."""
    value &= 2**64 - 1
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)
