"""A tiny random checkpoint, quick to load and quick to run, and what it says of a text by an independent way.

Torch and transformers are imported where they are first needed: most tests do without the seconds that this takes.
"""

import json
import shutil
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

TOKENIZER = Path(__file__).parents[1] / "fixtures" / "rubert-tiny-sentiment-balanced"
LABELS = ("negative", "neutral", "positive")
PANICKING = r"(x+x+)+y\1"  # a regular expression on which the tokenizer's library panics at
PANICS = "x" * 40
POISON = "irrigation"  # one token of the vocabulary; a text with this word has logits that are no numbers


def make_checkpoint(folder: Path, seed: int = 7) -> Path:
    """A BERT of one layer with the real tokenizer; its answers differ from text to text."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    torch.set_num_threads(1)  # beside other processes torch's threads wait for each other, far longer than they compute
    torch.manual_seed(seed)
    for file in TOKENIZER.iterdir():
        shutil.copy(file, folder)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    network = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            initializer_range=1.0,
            id2label=dict(enumerate(LABELS)),
            label2id={label: number for number, label in enumerate(LABELS)},
        )
    ).eval()
    with torch.no_grad():
        network.classifier.weight *= 0.3
        network.bert.embeddings.word_embeddings.weight[tokenizer.convert_tokens_to_ids(POISON)] = torch.nan
    network.save_pretrained(folder)
    return folder


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
    """The card's own way, one text at a time: the plain network, sigmoid, no batch. Texts are composed before.

    In float64: this network's scores are so large that float32's own rounding comes near to what tests allow.
    """

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        torch.set_num_threads(1)
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self.probabilities = lru_cache(maxsize=None)(self._probabilities)
        self._network = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval()

    def _probabilities(self, text: str, composed: bool = True) -> NDArray[np.float64]:
        import torch

        tokens = self._tokenizer(
            as_composed(text) if composed else text, return_tensors="pt", truncation=True, max_length=512
        )
        with torch.inference_mode():
            logits = self._network(**tokens).logits[0]
        return torch.sigmoid(logits.double()).numpy()

    def is_truncated(self, text: str) -> bool:
        return len(self._tokenizer(as_composed(text))["input_ids"]) > 512

    @staticmethod
    def label(probabilities: Sequence[float] | NDArray[np.float64]) -> str:
        return LABELS[int(np.argmax(probabilities))]

    @staticmethod
    def score(probabilities: Sequence[float] | NDArray[np.float64]) -> float:
        return float(np.dot(probabilities, [-1, 0, 1]))
