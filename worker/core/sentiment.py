"""The arithmetic of the model card: from logits to probabilities, and from these to a label and a score. Pure.

The card is that of cointegrated/rubert-tiny-sentiment-balanced. Probabilities are the sigmoid of each logit (not a
softmax, whatever the checkpoint's ``problem_type`` suggests), the label is that of the largest, and the score is
``probabilities · [-1, 0, 1]``.
"""

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from worker.core.events import named_tuples

Label = Literal["negative", "neutral", "positive"]
Activation = Literal["sigmoid", "softmax"]

LABELS: tuple[Label, Label, Label] = ("negative", "neutral", "positive")

Floats = NDArray[np.float64]


class Sentiment(NamedTuple):
    """The sentiment of one text. Probabilities are in the order of LABELS; the score is from -1 to 1."""

    label: Label
    score: float
    probabilities: tuple[float, float, float]


def to_probabilities(logits: NDArray[np.floating], activation: Activation = "sigmoid") -> Floats:
    """Probabilities of logits, in float64. Both have the same shape, whose last axis has the order of LABELS."""
    wide = np.asarray(logits, dtype=np.float64)
    if activation == "softmax":
        powers = np.exp(wide - wide.max(axis=-1, keepdims=True))
        softmax: Floats = powers / powers.sum(axis=-1, keepdims=True)
        return softmax
    half = np.exp(-np.abs(wide))  # never overflows
    return np.where(wide >= 0, 1.0, half) / (1.0 + half)


def to_scores(probabilities: Floats) -> Floats:
    """Scores (…) of probabilities (…, 3), from -1, very negative, to 1, very positive."""
    return probabilities[..., 2] - probabilities[..., 0]


def to_labels(probabilities: Floats) -> list[Label | None]:
    """The N labels of probabilities (N, 3); None for a row with NaN."""
    best = np.where(np.isnan(probabilities).any(axis=-1), -1, probabilities.argmax(axis=-1))
    return [None if label < 0 else LABELS[label] for label in best.tolist()]


def sentiments_of(probabilities: Floats) -> list[Sentiment]:
    """The N sentiments of probabilities (N, 3), none of which is NaN."""
    labels = map(LABELS.__getitem__, probabilities.argmax(axis=-1).tolist())
    of_texts = zip(*probabilities.T.tolist(), strict=True)
    return named_tuples(Sentiment, labels, to_scores(probabilities).tolist(), of_texts)


def to_sentiments(logits: NDArray[np.floating], activation: Activation = "sigmoid") -> list[Sentiment | None]:
    """The N sentiments of logits (N, 3); None where a logit is not finite."""
    finite = np.isfinite(logits).all(axis=-1)
    sentiments: list[Sentiment | None] = [
        *sentiments_of(to_probabilities(np.where(finite[:, None], logits, 0.0), activation))
    ]
    for place in np.flatnonzero(~finite).tolist():
        sentiments[place] = None
    return sentiments
