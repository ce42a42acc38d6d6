"""Collects the nodes, constants and weights of an ONNX graph."""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from worker.model.onnx import protobuf

OPSETS: Final = {"": 20, "com.microsoft": 1}  # ONNX Runtime of 1.17 and later knows them
MICROSOFT: Final = "com.microsoft"  # the domain of ONNX Runtime's own operators


class Graph(NamedTuple):
    """An ONNX model without its weights, as a serialized ModelProto, and the weights by the names of its initializers."""

    model: bytes
    initializers: Mapping[str, NDArray[Any]]


class GraphBuilder:
    """Builds a graph node by node. Values in the graph are known by their names."""

    def __init__(self) -> None:
        self._nodes: list[bytes] = []
        self._constants: dict[str, bytes] = {}
        self._weights: dict[str, NDArray[Any]] = {}
        self._values = 0

    def apply(self, op_type: str, *inputs: str, domain: str = "", **attributes: protobuf.Attribute) -> str:
        """Adds a node with one output, and returns the output's name. An input that is left out is an empty name."""
        (output,) = self.apply_for(1, op_type, *inputs, domain=domain, **attributes)
        return output

    def apply_for(
        self, outputs: int, op_type: str, *inputs: str, domain: str = "", **attributes: protobuf.Attribute
    ) -> list[str]:
        """Adds a node with so many outputs, and returns their names."""
        names = [f"value {self._values + number}" for number in range(outputs)]
        self._values += outputs
        self._nodes.append(protobuf.node(op_type, inputs, names, domain, attributes))
        return names

    def constant(self, *values: float, dtype: str = "int64") -> str:
        """A vector of these values that stands in the graph itself."""
        name = f"{dtype} {values}"
        self._constants[name] = protobuf.tensor(name, np.array(values, dtype))
        return name

    def scalar(self, value: float, dtype: str = "float32") -> str:
        """A single value that stands in the graph itself."""
        name = f"{dtype} {value}"
        self._constants[name] = protobuf.tensor(name, np.array(value, dtype))
        return name

    def weight(self, name: str, values: NDArray[Any]) -> str:
        """An initializer whose values are given to the session beside the graph."""
        self._weights[name] = np.ascontiguousarray(values)
        return name

    def graph(self, inputs: list[bytes], output: bytes) -> Graph:
        """The whole graph. ``inputs`` and ``output``: messages of ``protobuf.value_info``."""
        weights = [protobuf.external_tensor(name, values) for name, values in self._weights.items()]
        initializers = [*self._constants.values(), *weights]
        return Graph(protobuf.model(self._nodes, initializers, inputs, [output], OPSETS), self._weights)

    def name(self, value: str, name: str) -> str:
        """Gives a value another name, such as that of the graph's output."""
        self._nodes.append(protobuf.node("Identity", [value], [name], "", {}))
        return name
