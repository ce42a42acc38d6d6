"""Loads a checkpoint's model for ONNX Runtime."""

import numpy as np

from worker.model.checkpoint import Checkpoint, NeedsTorch
from worker.model.onnx.architecture import Architecture, NotCovered, architecture_of
from worker.model.onnx.graph import Weights, build_graph
from worker.model.onnx.session import OnnxModel
from worker.model.onnx.weights import weights_of
from worker.model.runner import BackendError
from worker.model.tokenizer import CheckpointTokenizer
from worker.model.tokenizer_checks import refuse_tokens_without_rows
from worker.model.weights import read_weights


def covered_architecture(checkpoint: Checkpoint) -> Architecture:
    """The architecture that config.json states. Raises NeedsTorch for one that the graph does not cover."""
    try:
        return architecture_of(checkpoint.config)
    except NotCovered as error:
        raise NeedsTorch(checkpoint.name, str(error)) from None


def load_onnx_model(
    checkpoint: Checkpoint, architecture: Architecture, tokenizer: CheckpointTokenizer, *, is_int8: bool
) -> OnnxModel:
    """The model of a checkpoint, in float32 or int8. Blocks.

    Raises ModelError for weights that do not fit config.json or the tokenizer, BackendError for those that do not fit int8,
    NeedsTorch for a file that only torch reads.
    """
    refuse_tokens_without_rows(checkpoint.name, tokenizer, architecture.vocabulary)
    found = weights_of(checkpoint.name, architecture, read_weights(checkpoint))
    weights = {
        name: values.astype(np.float32, copy=False) for name, values in found.items()
    }  # a file may hold integers
    if is_int8:
        _refuse_what_is_not_finite(checkpoint.name, weights)
    return OnnxModel(build_graph(architecture, weights, is_int8=is_int8))


def _refuse_what_is_not_finite(name: str, weights: Weights) -> None:
    """Bytes have no NaN: a text whose logits are no numbers in float32 would get a result, and change its neighbours'."""
    for weight, values in weights.items():
        if not np.isfinite(values).all():
            raise BackendError(
                f"dtype int8 cannot compute model {name}: {weight} holds numbers that are not finite; set dtype to float32"
            )
