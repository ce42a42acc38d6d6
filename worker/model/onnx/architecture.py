"""What a checkpoint's config.json says of its model, with transformers' defaults, and whether the graph covers it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from worker.model.onnx.activations import ACTIVATIONS

PREFIXES: Final = {"bert": "bert", "roberta": "roberta", "xlm-roberta": "roberta", "camembert": "roberta"}
DEFAULTS: Final[Mapping[str, Any]] = {  # those of transformers 5
    "vocab_size": 30_522,  # of all types but roberta
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3_072,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}
ROBERTA_VOCABULARY: Final = 50_265
DEFAULT_LABELS: Final = 2
ROBERTA_PADDING: Final = 1
COUNTS: Final = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings", "type_vocab_size",
)  # fmt: skip


class NotCovered(Exception):
    """The graph does not cover this model. The message says why: "its model_type is 'albert', not one of …"."""


@dataclass(frozen=True)
class Architecture:
    """A BERT encoder with a classification head. Sizes are numbers of rows or columns of the weights.

    ``prefix``: the first word in the names of the encoder's weights. ``head``: the names of the head's two layers.
    ``first_position``: the row of the first token's position; in RoBERTa it is the one after the id of padding.
    """

    prefix: str
    head: tuple[str, str]
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
    """The architecture that a config.json states, given as the object in the file.

    Raises NotCovered, and ValueError with a sentence where a value is wrong.
    """
    _refuse_what_is_not_covered(config)
    own = {"vocab_size": ROBERTA_VOCABULARY} if config["model_type"] == "roberta" else {}
    stated = {**DEFAULTS, **own, **config}
    for field in COUNTS:
        _refuse_wrong_count(field, stated[field])
    if stated["hidden_size"] % stated["num_attention_heads"]:
        raise _wrong("hidden_size", stated["hidden_size"], f"a multiple of {stated['num_attention_heads']} heads")
    is_bert = config["model_type"] == "bert"
    return Architecture(
        prefix=PREFIXES[config["model_type"]],
        head=("bert.pooler.dense", "classifier") if is_bert else ("classifier.dense", "classifier.out_proj"),
        vocabulary=stated["vocab_size"],
        hidden=stated["hidden_size"],
        layers=stated["num_hidden_layers"],
        heads=stated["num_attention_heads"],
        intermediate=stated["intermediate_size"],
        positions=stated["max_position_embeddings"],
        first_position=0 if is_bert else _first_position(config, stated["max_position_embeddings"]),
        token_types=stated["type_vocab_size"],
        labels=_labels(config),
        activation=stated["hidden_act"],
        norm_epsilon=_norm_epsilon(stated["layer_norm_eps"]),
    )


def _refuse_what_is_not_covered(config: Mapping[str, Any]) -> None:
    for field, covered, default in (
        ("model_type", PREFIXES, None),
        ("hidden_act", ACTIVATIONS, DEFAULTS["hidden_act"]),
        ("position_embedding_type", ("absolute",), "absolute"),
    ):
        value = config.get(field, default)
        if not isinstance(value, str) or value not in covered:
            right = "one of " * (len(covered) > 1) + ", ".join(covered)
            raise NotCovered(f"its {field} is {_shown(value)}, not {right}")
    for field in ("is_decoder", "add_cross_attention", "quantization_config"):
        if config.get(field):
            raise NotCovered(f"its config.json sets {field}")


def _first_position(config: Mapping[str, Any], positions: int) -> int:
    padding = config.get("pad_token_id", ROBERTA_PADDING)
    if type(padding) is not int or not 0 <= padding < positions - 1:
        raise _wrong("pad_token_id", padding, f"a whole number from 0 to {positions - 2}")
    return padding + 1


def _labels(config: Mapping[str, Any]) -> int:
    """The number of labels: how many names id2label has, else num_labels."""
    names = config.get("id2label")
    labels = config.get("num_labels", DEFAULT_LABELS) if names is None else len(names)
    _refuse_wrong_count("num_labels", labels)
    return int(labels)


def _norm_epsilon(value: object) -> float:
    if type(value) not in (int, float) or not 0 <= float(value) < 1:  # type: ignore[arg-type]
        raise _wrong("layer_norm_eps", value, "a small number from 0 up, such as 1e-12")
    return float(value)  # type: ignore[arg-type]


def _refuse_wrong_count(field: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise _wrong(field, value, "a whole number, 1 or more")


def _wrong(field: str, value: object, right: str) -> ValueError:
    return ValueError(f"{field} in config.json is {_shown(value)}; it should be {right}")


def _shown(value: object) -> str:
    return ascii(value)[:100]
