"""The activation functions that config.json may name as hidden_act, as nodes of an ONNX graph.

The names and formulas are those of transformers' ACT2FN. Two of its functions are not here, prelu and xielu, because they
have weights of their own.
"""

import math
from collections.abc import Callable
from typing import Final

from worker.model.onnx.graph_builder import GraphBuilder

LAPLACE_MEAN: Final = 0.707107
LAPLACE_DEVIATION: Final = 0.282095
QUICK_GELU_SLOPE: Final = 1.702

Activation = Callable[[GraphBuilder, str], str]
"""The graph's builder and the name of some rows in it → the name of the activated rows."""


def _operator(op_type: str) -> Activation:
    return lambda builder, rows: builder.apply(op_type, rows)


def _clipped(before: Activation, lowest: float, highest: float) -> Activation:
    return lambda builder, rows: builder.apply(
        "Clip", before(builder, rows), builder.scalar(lowest), builder.scalar(highest)
    )


def _identity(_: GraphBuilder, rows: str) -> str:
    return rows


def _sigmoid_linear(slope: float) -> Activation:
    def activate(builder: GraphBuilder, rows: str) -> str:
        steep = rows if slope == 1.0 else builder.apply("Mul", rows, builder.scalar(slope))
        return builder.apply("Mul", rows, builder.apply("Sigmoid", steep))

    return activate


def _tanh_gelu(builder: GraphBuilder, rows: str) -> str:
    return builder.apply("Gelu", rows, approximate="tanh")


def _leaky_relu(builder: GraphBuilder, rows: str) -> str:
    return builder.apply("LeakyRelu", rows, alpha=0.01)


def _laplace(builder: GraphBuilder, rows: str) -> str:
    centred = builder.apply("Sub", rows, builder.scalar(LAPLACE_MEAN))
    scaled = builder.apply("Div", centred, builder.scalar(LAPLACE_DEVIATION * math.sqrt(2.0)))
    raised = builder.apply("Add", builder.apply("Erf", scaled), builder.scalar(1.0))
    return builder.apply("Mul", raised, builder.scalar(0.5))


def _squared_relu(builder: GraphBuilder, rows: str) -> str:
    positive = builder.apply("Relu", rows)
    return builder.apply("Mul", positive, positive)


def _root_of_softplus(builder: GraphBuilder, rows: str) -> str:
    return builder.apply("Sqrt", builder.apply("Softplus", rows))


_gelu = _operator("Gelu")
_silu = _sigmoid_linear(1.0)

ACTIVATIONS: Final[dict[str, Activation]] = {
    "gelu": _gelu,
    "gelu_python": _gelu,
    "gelu_10": _clipped(_gelu, -10.0, 10.0),
    "gelu_fast": _tanh_gelu,
    "gelu_new": _tanh_gelu,
    "gelu_accurate": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "gelu_python_tanh": _tanh_gelu,
    "quick_gelu": _sigmoid_linear(QUICK_GELU_SLOPE),
    "hardswish": _operator("HardSwish"),
    "laplace": _laplace,
    "leaky_relu": _leaky_relu,
    "linear": _identity,
    "mish": _operator("Mish"),
    "relu": _operator("Relu"),
    "relu2": _squared_relu,
    "relu6": _clipped(_identity, 0.0, 6.0),
    "sigmoid": _operator("Sigmoid"),
    "silu": _silu,
    "swish": _silu,
    "sqrtsoftplus": _root_of_softplus,
    "tanh": _operator("Tanh"),
}
