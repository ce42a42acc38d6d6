"""Builds the ONNX graph of a BERT classifier: ids (N, T) and lengths (N), both int64 → logits (N, labels), float32.

Text n has ``lengths[n]`` tokens, the rest is padding. Rows of hidden states go token by token, (T · N, width): a head's rows
are then a fixed step apart across a whole batch, so that ONNX Runtime need not copy them. The last layer computes keys
and values of all tokens, and everything else of the first token alone, because the head reads no other.
"""

from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from worker.model.onnx import protobuf
from worker.model.onnx.activations import ACTIVATIONS
from worker.model.onnx.architecture import Architecture
from worker.model.onnx.graph_builder import Graph, GraphBuilder
from worker.model.onnx.products import Float32Products, Int8Products

Weights = Mapping[str, NDArray[np.float32]]
IDS: Final = "ids"
LENGTHS: Final = "lengths"
LOGITS: Final = "logits"


def build_graph(architecture: Architecture, weights: Weights, *, is_int8: bool = False) -> Graph:
    """The graph of a classifier. ``weights``: those that ``weight_shapes`` names, of these shapes.

    ``is_int8``: products with weights are computed in int8, their inputs quantized as they come. The rest stays in float32:
    embeddings are only looked up, so int8 would make them less exact and nothing faster.
    """
    return _Classifier(architecture, weights, is_int8).graph()


class _Classifier:
    """Writes a classifier into a graph, part by part."""

    def __init__(self, architecture: Architecture, weights: Weights, is_int8: bool) -> None:
        self._of = architecture
        self._weights = weights
        self._builder = GraphBuilder()
        self._product = Int8Products(self._builder) if is_int8 else Float32Products(self._builder)
        self._head_size = architecture.hidden // architecture.heads

    def graph(self) -> Graph:
        builder = self._builder
        self._measure()
        hidden = self._embeddings()
        for layer in range(self._of.layers):
            hidden = self._layer(hidden, f"{self._of.prefix}.encoder.layer.{layer}", layer == self._of.layers - 1)
        builder.name(self._head(hidden), LOGITS)
        inputs = [
            protobuf.value_info(IDS, protobuf.INT64, ["texts", "tokens"]),
            protobuf.value_info(LENGTHS, protobuf.INT64, ["texts"]),
        ]
        return builder.graph(inputs, protobuf.value_info(LOGITS, protobuf.FLOAT, ["texts", "labels"]))

    def _measure(self) -> None:
        """The sizes of the batch, and shapes made of them."""
        builder = self._builder
        heads, size, width = (builder.constant(each) for each in (self._of.heads, self._head_size, self._of.hidden))
        shape = builder.apply("Shape", IDS)
        self._texts = builder.apply("Gather", shape, builder.constant(0))
        self._tokens = builder.apply("Gather", shape, builder.constant(1))
        self._to_heads = builder.apply("Concat", self._tokens, self._texts, heads, size, axis=0)
        self._first_to_heads = builder.apply("Concat", builder.constant(1), self._texts, heads, size, axis=0)
        self._to_rows = builder.apply("Concat", builder.constant(-1), width, axis=0)
        self._bias = self._padding_bias()

    def _padding_bias(self) -> str:
        """What is added to attention's scores: (N, 1, 1, T), minus infinity at padding, else 0."""
        builder = self._builder
        places = builder.apply(
            "Range", builder.scalar(0, "int64"), builder.apply("Squeeze", self._tokens), builder.scalar(1, "int64")
        )
        is_text = builder.apply("Less", places, builder.apply("Unsqueeze", LENGTHS, builder.constant(1, 2, 3)))
        return builder.apply("Where", is_text, builder.scalar(0.0), builder.scalar(-np.inf))

    def _embeddings(self) -> str:
        """Ids (N, T) → rows (T · N, width)."""
        builder = self._builder
        name = f"{self._of.prefix}.embeddings"
        words, places, types = (
            self._weights[f"{name}.{kind}_embeddings.weight"] for kind in ("word", "position", "token_type")
        )
        positions = builder.weight("positions", (places[self._of.first_position :] + types[0])[:, None])
        zero = builder.constant(0)
        rows = builder.apply("Gather", builder.weight("words", words), builder.apply("Transpose", IDS, perm=[1, 0]))
        sums = builder.apply("Add", rows, builder.apply("Slice", positions, zero, self._tokens, zero))
        return self._norm(builder.apply("Reshape", sums, self._to_rows), f"{name}.LayerNorm")

    def _layer(self, hidden: str, name: str, is_last: bool) -> str:
        """Rows (T · N, width) → rows (T · N, width), or (N, width) in the last layer."""
        builder = self._builder
        attention = f"{name}.attention"
        residual = hidden
        if is_last:
            zero = builder.constant(0)
            residual = builder.apply("Slice", hidden, zero, self._texts, zero)
        attended = self._attention(residual, hidden, f"{attention}.self", is_last)
        output = self._linear(attended, f"{attention}.output.dense")
        middle = self._norm(builder.apply("Add", output, residual), f"{attention}.output.LayerNorm")
        activation = ACTIVATIONS[self._of.activation]
        wide = activation(builder, self._linear(middle, f"{name}.intermediate.dense"))
        down = self._linear(wide, f"{name}.output.dense")
        return self._norm(builder.apply("Add", down, middle), f"{name}.output.LayerNorm")

    def _attention(self, queries: str, hidden: str, name: str, is_last: bool) -> str:
        """Rows of the queries and of all tokens → rows of the queries."""
        builder = self._builder
        query, key, value = (
            builder.apply("Reshape", rows, shape)
            for rows, shape in (
                (
                    self._linear(queries, f"{name}.query", self._head_size**-0.5),
                    self._first_to_heads if is_last else self._to_heads,
                ),
                (self._linear(hidden, f"{name}.key"), self._to_heads),
                (self._linear(hidden, f"{name}.value"), self._to_heads),
            )
        )
        query = builder.apply("Transpose", query, perm=[1, 2, 0, 3])
        scores = builder.apply("MatMul", query, builder.apply("Transpose", key, perm=[1, 2, 3, 0]))
        shares = builder.apply("Softmax", builder.apply("Add", scores, self._bias), axis=-1)
        attended = builder.apply("MatMul", shares, builder.apply("Transpose", value, perm=[1, 2, 0, 3]))
        return builder.apply("Reshape", builder.apply("Transpose", attended, perm=[2, 0, 1, 3]), self._to_rows)

    def _head(self, rows: str) -> str:
        """The first tokens' rows (N, width) → logits (N, labels)."""
        inner, outer = self._of.head
        return self._linear(self._builder.apply("Tanh", self._linear(rows, inner)), outer)

    def _linear(self, rows: str, name: str, scale: float = 1.0) -> str:
        """Rows (M, in) → rows (M, out), multiplied by ``scale``."""
        weight, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        if scale != 1.0:
            weight, bias = weight * np.float32(scale), bias * np.float32(scale)
        return self._product(rows, name, weight, bias)

    def _norm(self, rows: str, name: str) -> str:
        scale, bias = (
            self._builder.weight(f"{name}.{kind}", self._weights[f"{name}.{kind}"]) for kind in ("weight", "bias")
        )
        return self._builder.apply("LayerNormalization", rows, scale, bias, axis=-1, epsilon=self._of.norm_epsilon)
