"""What a checkpoint's config.json says of its network, with transformers' defaults, and whether the graph covers it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from worker.model.onnx.activations import ACTIVATIONS

PREFIXES: Final = {"bert": "bert", "roberta": "roberta", "xlm-roberta": "roberta", "camembert": "roberta"}
DEFAULTS: Final[Mapping[str, Any]] = {  # of transformers 5, for all these families
    "vocab_size": 30_522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3_072,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "num_labels": 2,
}


class NotCovered(Exception):
    """The graph does not cover this network; the message says why, as the end of a sentence about the checkpoint."""


@dataclass(frozen=True)
class Architecture:
    """A BERT encoder with a classification head. Sizes are numbers of rows or columns of the weights.

    ``prefix``: what begins the names of the encoder's weights. ``has_pooler``: the head is BERT's pooler and classifier,
    else RoBERTa's dense and out_proj. ``first_position``: the row of the first token's position.
    """

    prefix: str
    has_pooler: bool
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    intermediate: int
    positions: int
    first_position: int
    token_types: int
    labels: int
    activation: str
    norm_epsilon: float


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a config.json states, given as it was read. Raises NotCovered."""
    _refuse_what_is_not_covered(config)
    model_type = config["model_type"]
    stated = {**DEFAULTS, **config}
    is_bert = model_type == "bert"
    labels = config.get("id2label")
    return Architecture(
        prefix=PREFIXES[model_type],
        has_pooler=is_bert,
        vocabulary=stated["vocab_size"],
        hidden=stated["hidden_size"],
        layers=stated["num_hidden_layers"],
        heads=stated["num_attention_heads"],
        intermediate=stated["intermediate_size"],
        positions=stated["max_position_embeddings"],
        first_position=0 if is_bert else config.get("pad_token_id", 1) + 1,
        token_types=stated["type_vocab_size"],
        labels=len(labels) if labels is not None else stated["num_labels"],
        activation=stated["hidden_act"],
        norm_epsilon=float(stated["layer_norm_eps"]),
    )


def _refuse_what_is_not_covered(config: Mapping[str, Any]) -> None:
    model_type = config.get("model_type")
    if model_type not in PREFIXES:
        raise NotCovered(f"its model_type is {model_type}, not one of {', '.join(PREFIXES)}")
    activation = config.get("hidden_act", DEFAULTS["hidden_act"])
    if activation not in ACTIVATIONS:
        raise NotCovered(f"its hidden_act is {activation}, not one of {', '.join(ACTIVATIONS)}")
    positions = config.get("position_embedding_type") or "absolute"
    if positions != "absolute":
        raise NotCovered(f"its position_embedding_type is {positions}, not absolute")
    for field in ("is_decoder", "add_cross_attention", "quantization_config"):
        if config.get(field):
            raise NotCovered(f"its config.json sets {field}")
