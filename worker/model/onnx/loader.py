"""Loads a checkpoint's model for ONNX Runtime."""

from worker.model.checkpoint import Checkpoint, ModelError, NeedsTorch, refuse_tokens_without_rows
from worker.model.onnx.architecture import NotCovered, architecture_of
from worker.model.onnx.graph import build_graph
from worker.model.onnx.session import OnnxModel
from worker.model.onnx.quantization import quantized
from worker.model.onnx.weights import weight_shapes
from worker.model.weights import read_weights


def load_onnx_model(checkpoint: Checkpoint, *, highest_id: int, is_int8: bool) -> OnnxModel:
    """The model of a checkpoint, in float32 or int8. ``highest_id``: of its tokenizer. Blocks.

    Raises NeedsTorch for a model that the graph does not cover, ModelError for weights that do not fit config.json.
    """
    try:
        architecture = architecture_of(checkpoint.config)
    except NotCovered as error:
        raise NeedsTorch(checkpoint.name, str(error)) from None
    refuse_tokens_without_rows(checkpoint.name, highest_id, architecture.vocabulary)
    shapes = weight_shapes(architecture)
    weights = read_weights(checkpoint, wanted=set(shapes))
    missing = sorted(set(shapes) - set(weights))
    if missing:
        raise ModelError(untrained(...))
    graph = build_graph(architecture, weights)
    return OnnxModel(quantized(graph) if is_int8 else graph)
