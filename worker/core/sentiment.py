"""The card's arithmetic: logits → probabilities → label and score. Pure; numpy alone.

Source: the model card of cointegrated/rubert-tiny-sentiment-balanced. Probabilities are the sigmoid of each logit (not a
softmax, whatever the checkpoint's ``problem_type`` suggests), the label is that of the largest, and the score is
``probabilities · [-1, 0, 1]``.
"""

from itertools import repeat
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Label = Literal["negative", "neutral", "positive"]
Activation = Literal["sigmoid", "softmax"]

LABELS: tuple[Label, Label, Label] = ("negative", "neutral", "positive")

Floats = NDArray[np.float64]


class Sentiment(NamedTuple):
    """What the model says of one text. Probabilities are in the order of LABELS; the score is from -1 to 1."""

    label: Label
    score: float
    probabilities: tuple[float, float, float]


def to_probabilities(logits: NDArray[np.floating], activation: Activation = "sigmoid") -> Floats:
    """Logits, any shape whose last axis is LABELS, to probabilities of the same shape, in float64."""
    wide = np.asarray(logits, dtype=np.float64)
    if activation == "softmax":
        powers = np.exp(wide - wide.max(axis=-1, keepdims=True))
        softmax: Floats = powers / powers.sum(axis=-1, keepdims=True)
        return softmax
    half = np.exp(-np.abs(wide))  # never overflows
    return np.where(wide >= 0, 1.0, half) / (1.0 + half)


def to_scores(probabilities: Floats) -> Floats:
    """Probabilities (…, 3) to scores (…) from -1, very negative, to 1, very positive."""
    return probabilities[..., 2] - probabilities[..., 0]


def to_labels(probabilities: Floats) -> list[Label | None]:
    """Probabilities (N, 3) to N labels; None for a row with NaN."""
    best = np.where(np.isnan(probabilities).any(axis=-1), -1, probabilities.argmax(axis=-1))
    return [None if label < 0 else LABELS[label] for label in best.tolist()]


def to_sentiments(logits: NDArray[np.floating], activation: Activation = "sigmoid") -> list[Sentiment | None]:
    """Logits (N, 3) to N sentiments; None where a logit is not finite, for that is no answer."""
    finite = np.isfinite(logits).all(axis=-1)
    probabilities = to_probabilities(np.where(finite[:, None], logits, 0.0), activation)
    labels = map(LABELS.__getitem__, probabilities.argmax(axis=-1).tolist())
    rows = zip(*probabilities.T.tolist(), strict=True)
    columns = zip(labels, to_scores(probabilities).tolist(), rows, strict=True)
    sentiments: list[Sentiment | None] = list(map(tuple.__new__, repeat(Sentiment), columns))
    for place in np.flatnonzero(~finite).tolist():
        sentiments[place] = None
    return sentiments
