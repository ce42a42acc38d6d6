"""A tiny random checkpoint, quick to load and quick to run, and what it says of a text by an independent way.

Neither torch nor transformers is needed for it: most tests do without the seconds that importing them takes.
"""

import json
import math
import shutil
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

TOKENIZER = Path(__file__).parents[1] / "fixtures" / "rubert-tiny-sentiment-balanced"
LABELS = ("negative", "neutral", "positive")
PANICKING = r"(x+x+)+y\1"  # a regular expression on which the tokenizer's library panics at
PANICS = "x" * 40
POISON = "irrigation"  # one token of the vocabulary; a text with this word has logits that are no numbers

WIDTH, WIDE, HEADS, POSITIONS = 24, 32, 2, 512
LAYER = "bert.encoder.layer.0"
NORMS = ("bert.embeddings.LayerNorm", f"{LAYER}.attention.output.LayerNorm", f"{LAYER}.output.LayerNorm")
PRODUCTS = {  # of each product of matrices how many numbers it gives, and of how many
    **dict.fromkeys([f"{LAYER}.attention.self.{name}" for name in ("query", "key", "value")], (WIDTH, WIDTH)),
    f"{LAYER}.attention.output.dense": (WIDTH, WIDTH),
    f"{LAYER}.intermediate.dense": (WIDE, WIDTH),
    f"{LAYER}.output.dense": (WIDTH, WIDE),
    "bert.pooler.dense": (WIDTH, WIDTH),
    "classifier": (len(LABELS), WIDTH),
}
Array = NDArray[np.float64]


def make_checkpoint(folder: Path, seed: int = 7, labels: Sequence[str] = LABELS, **more: object) -> Path:
    """A BERT of one layer with the real tokenizer; its answers differ from text to text. ``more`` goes into its config."""
    for file in TOKENIZER.iterdir():
        shutil.copy(file, folder)
    tokenizer = read_tokenizer(folder)
    config = {
        "architectures": ["BertForSequenceClassification"],
        "model_type": "bert",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "intermediate_size": WIDE,
        "max_position_embeddings": POSITIONS,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
        "dtype": "float32",
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
        **more,
    }
    (folder / "config.json").write_text(json.dumps(config))
    weights = random_weights(np.random.default_rng(seed), tokenizer.get_vocab_size(), len(labels))
    weights["bert.embeddings.word_embeddings.weight"][tokenizer.token_to_id(POISON)] = np.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def random_weights(
    random: np.random.Generator, vocabulary: int, labels: int = len(LABELS)
) -> dict[str, NDArray[np.float32]]:
    """Weights by the names that transformers gives them."""
    rows = {"word": vocabulary, "position": POSITIONS, "token_type": 2}
    shapes = {f"bert.embeddings.{name}_embeddings.weight": (count, WIDTH) for name, count in rows.items()}
    products = {**PRODUCTS, "classifier": (labels, WIDTH)}
    shapes |= {f"{name}.weight": shape for name, shape in products.items()}
    weights = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    weights["classifier.weight"] *= 0.3
    weights |= {f"{name}.bias": np.zeros(outputs, np.float32) for name, (outputs, _) in products.items()}
    weights |= {f"{name}.weight": np.ones(WIDTH, np.float32) for name in NORMS}
    return weights | {f"{name}.bias": np.zeros(WIDTH, np.float32) for name in NORMS}


def read_tokenizer(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def with_pattern(folder: Path, pattern: str) -> Path:
    """Has the tokenizer of a checkpoint split texts by a regular expression of its own."""
    for name, entries in {
        "tokenizer.json": {
            "pre_tokenizer": {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        },
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
    }.items():
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | entries))
    return folder


def as_composed(text: str) -> str:
    """What ``normalize=nfc`` makes of a text, by a way of its own: mark by mark."""
    done, open_piece = [], ""
    for is_mark, chars in groupby(text, lambda char: unicodedata.combining(char) > 0):
        run = "".join(chars)
        if is_mark and len(run) > 30:
            done += [unicodedata.normalize("NFC", open_piece), run]
            open_piece = ""
        else:
            is_stress = run[0] == "\u0301" and open_piece != "" and open_piece[-1] in "аеёиоуыэюяАЕЁИОУЫЭЮЯ"
            open_piece += run[is_stress:]
    return "".join([*done, unicodedata.normalize("NFC", open_piece)])


class Oracle:
    """The card's own way, one text at a time: the plain model, sigmoid, no batch. Texts are composed before.

    In float64: this model's scores are so large that float32's own rounding comes near to what tests allow.
    """

    def __init__(self, folder: Path) -> None:
        self._tokenizer = read_tokenizer(folder)
        self.probabilities = lru_cache(maxsize=None)(self._probabilities)
        weights = load_file(folder / "model.safetensors")
        self._weights = {name: array.astype(np.float64) for name, array in weights.items()}

    def _probabilities(self, text: str, composed: bool = True) -> Array:
        return 1 / (1 + np.exp(-self.logits(text, composed)))

    def logits(self, text: str, composed: bool = True) -> Array:
        ids = self._ids(as_composed(text) if composed else text)
        if len(ids) > POSITIONS:
            ids = [*ids[: POSITIONS - 1], ids[-1]]  # the mark of the end stays
        return logits_of(self._weights, ids)

    def is_truncated(self, text: str) -> bool:
        return len(self._ids(as_composed(text))) > POSITIONS

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    @staticmethod
    def label(probabilities: Sequence[float] | NDArray[np.float64]) -> str:
        return LABELS[int(np.argmax(probabilities))]

    @staticmethod
    def score(probabilities: Sequence[float] | NDArray[np.float64]) -> float:
        return float(np.dot(probabilities, [-1, 0, 1]))


def logits_of(weights: Mapping[str, Array], ids: Sequence[int]) -> Array:
    """What BERT computes of one text's tokens, step by step as its paper has it (Devlin et al., 2018).

    The classifier looks at the first token, so that of the only layer no other token's output is needed.
    """

    def product(name: str, rows: Array) -> Array:
        return rows @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def normalized(name: str, rows: Array) -> Array:
        centred = rows - rows.mean(-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
        return centred / deviation * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    word, position, token_type = (
        weights[f"bert.embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")
    )
    rows = normalized(NORMS[0], word[ids] + position[: len(ids)] + token_type[0])
    query, key, value = (
        product(f"{LAYER}.attention.self.{name}", given).reshape(len(given), HEADS, -1).swapaxes(0, 1)
        for name, given in (("query", rows[:1]), ("key", rows), ("value", rows))
    )
    scores = query @ key.swapaxes(1, 2) / math.sqrt(WIDTH // HEADS)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    seen = (shares / shares.sum(-1, keepdims=True) @ value).swapaxes(0, 1).reshape(-1, WIDTH)
    first = normalized(NORMS[1], rows[0] + product(f"{LAYER}.attention.output.dense", seen[0]))
    wide = product(f"{LAYER}.intermediate.dense", first)
    wide *= (1 + np.vectorize(math.erf)(wide / math.sqrt(2))) / 2
    first = normalized(NORMS[2], first + product(f"{LAYER}.output.dense", wide))
    return product("classifier", np.tanh(product("bert.pooler.dense", first)))
