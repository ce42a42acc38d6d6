"""A tiny random checkpoint, quick to load and quick to run, and what it says of a text by an independent way."""

import shutil
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

TOKENIZER = Path(__file__).parent / "fixtures" / "rubert-tiny-sentiment-balanced"
LABELS = ("negative", "neutral", "positive")
POISON = "irrigation"  # one token of the vocabulary; a text with this word has logits that are no numbers


def make_checkpoint(folder: Path, seed: int = 7) -> Path:
    """A BERT of one layer with the real tokenizer; its answers differ from text to text."""
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


class Oracle:
    """The card's own way, one text at a time: the plain network, sigmoid, no batch.

    In float64: this network's scores are so large that float32's own rounding comes near to what tests allow.
    """

    def __init__(self, folder: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self.probabilities = lru_cache(maxsize=None)(self._probabilities)
        self._network = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval()

    def _probabilities(self, text: str) -> NDArray[np.float64]:
        tokens = self._tokenizer(text, return_tensors="pt", truncation=True, max_length=512)
        with torch.inference_mode():
            logits = self._network(**tokens).logits[0]
        return torch.sigmoid(logits.double()).numpy()

    def is_truncated(self, text: str) -> bool:
        return len(self._tokenizer(text)["input_ids"]) > 512

    @staticmethod
    def label(probabilities: Sequence[float] | NDArray[np.float64]) -> str:
        return LABELS[int(np.argmax(probabilities))]

    @staticmethod
    def score(probabilities: Sequence[float] | NDArray[np.float64]) -> float:
        return float(np.dot(probabilities, [-1, 0, 1]))
