"""Products of rows with weights in a graph: in float32, or in int8 with rows quantized as they come.

A call of either class takes the name of rows (M, in), and a layer's name, weight (out, in) and bias (out). It returns the
name of rows (M, out).
"""

import numpy as np
from numpy.typing import NDArray

from worker.model.onnx.graph_builder import MICROSOFT, GraphBuilder
from worker.model.onnx.quantization import needs_reduced_range, quantized


class Float32Products:
    """Products in float32. ONNX Runtime packs the weights once, when the session is made."""

    def __init__(self, builder: GraphBuilder) -> None:
        self._builder = builder

    def __call__(self, rows: str, name: str, weight: NDArray[np.float32], bias: NDArray[np.float32]) -> str:
        builder = self._builder
        weights = builder.weight(f"{name}.weight", weight), builder.weight(f"{name}.bias", bias)
        return builder.apply("Gemm", rows, *weights, transB=1)


class Int8Products:
    """Products in int8. Rows that several layers read, such as those of query, key and value, are quantized once."""

    def __init__(self, builder: GraphBuilder) -> None:
        self._builder = builder
        self._quantized_rows: dict[str, list[str]] = {}

    def __call__(self, rows: str, name: str, weight: NDArray[np.float32], bias: NDArray[np.float32]) -> str:
        builder = self._builder
        if rows not in self._quantized_rows:
            self._quantized_rows[rows] = builder.apply_for(3, "DynamicQuantizeLinear", rows)
        numbers, scale, zero = self._quantized_rows[rows]
        columns, scales = quantized(weight, has_reduced_range=needs_reduced_range())
        column_scales = builder.weight(f"{name}.scales", scales)
        inputs = (numbers, builder.weight(f"{name}.weight", columns), scale, column_scales, zero, "")
        return builder.apply("MatMulIntegerToFloat", *inputs, builder.weight(f"{name}.bias", bias), domain=MICROSOFT)
