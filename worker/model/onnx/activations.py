"""The activation functions that config.json may name as hidden_act, as nodes of an ONNX graph."""

from collections.abc import Callable
from typing import Final

from worker.model.onnx.graph_builder import GraphBuilder

Activation = Callable[[GraphBuilder, str], str]


def _gelu(builder: GraphBuilder, rows: str) -> str:
    return builder.apply("Gelu", rows)


def _tanh_gelu(builder: GraphBuilder, rows: str) -> str:
    return builder.apply("Gelu", rows, approximate="tanh")


ACTIVATIONS: Final[dict[str, Activation]] = {
    "gelu": _gelu,
    "gelu_new": _tanh_gelu,
    "relu": lambda builder, rows: builder.apply("Relu", rows),
}
