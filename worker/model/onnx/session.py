"""Computes a classifier's graph by ONNX Runtime on a CPU."""

import os
from typing import Final

import numpy as np
from numpy.typing import NDArray

from worker.model.onnx.graph import IDS, LENGTHS
from worker.model.onnx.graph_builder import Graph

# ONNX Runtime would report each session to its maker, and keep an id of this machine in a cache.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime

ERRORS: Final = 3  # of ONNX Runtime's log levels


class OnnxModel:
    """Token ids → logits. A call computes on the calling thread alone and blocks; several threads may call at once."""

    def __init__(self, graph: Graph) -> None:
        """Blocks for some hundred milliseconds while ONNX Runtime prepares the graph.

        It copies the weights: the graph and its arrays need not be kept. Raises what ONNX Runtime raises.
        """
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = ERRORS
        options.enable_mem_pattern = False  # else memory is kept for each shape of a batch that was met
        names = list(graph.initializers)
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(graph.initializers[name]) for name in names]
        options.add_external_initializers(names, values)
        self._session = onnxruntime.InferenceSession(graph.model, options, providers=["CPUExecutionProvider"])

    def __call__(self, ids: NDArray[np.int64], lengths: NDArray[np.int64] | None) -> NDArray[np.float32]:
        """Logits (N, labels) of ids (N, T). Text n has ``lengths[n]`` tokens, the rest is padding; None: each text has T."""
        if lengths is None:
            lengths = np.full(len(ids), ids.shape[1])
        logits: NDArray[np.float32]
        (logits,) = self._session.run(None, {IDS: ids, LENGTHS: lengths})
        return logits
