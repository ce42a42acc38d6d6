"""From logits to probabilities, and from these to a label and a score. Pure.

The default is the card of cointegrated/rubert-tiny-sentiment-balanced. Probabilities are the sigmoid of each logit (not a
softmax, whatever the checkpoint's ``problem_type`` suggests), the label is that of the largest, and the score is
``probabilities · [-1, 0, 1]``.
"""

from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from worker.core.events import named_tuples

Activation = Literal["sigmoid", "softmax"]
Floats = NDArray[np.float64]

LABELS: Final = ("negative", "neutral", "positive")
"""The labels of the model card."""


class LabelSet(NamedTuple):
    """The labels of a model, and how its logits become results.

    ``names``: in the order of the logits. ``weights``: what the score multiplies each probability by; None where results
    have no score. ``threshold``: a result also lists all labels with this probability or more; None for no such list.
    """

    names: tuple[str, ...]
    activation: Activation
    weights: tuple[float, ...] | None
    threshold: float | None = None


CARD: Final = LabelSet(LABELS, "sigmoid", (-1.0, 0.0, 1.0))


class Sentiment(NamedTuple):
    """What a model says of one text: the most probable label, the score, and probabilities in the order of its labels.

    The score is None where the labels have no weights; by the card's it is from -1 to 1.
    """

    label: str
    score: float | None
    probabilities: tuple[float, ...]


def to_probabilities(logits: NDArray[np.floating], activation: Activation = "sigmoid") -> Floats:
    """Probabilities of logits, in float64. Both have the same shape, whose last axis has the order of the labels."""
    wide = np.asarray(logits, dtype=np.float64)
    if activation == "softmax":
        powers = np.exp(wide - wide.max(axis=-1, keepdims=True))
        softmax: Floats = powers / powers.sum(axis=-1, keepdims=True)
        return softmax
    half = np.exp(-np.abs(wide))  # never overflows
    return np.where(wide >= 0, 1.0, half) / (1.0 + half)


def to_scores(probabilities: Floats, weights: Sequence[float]) -> Floats:
    """Scores (…) of probabilities (…, L), each times the weight of its label.

    Label by label and not by a product of matrices, which would round a text's score differently in another batch.
    """
    scores = np.zeros(probabilities.shape[:-1])
    for place, weight in enumerate(weights):
        if weight:
            scores += weight * probabilities[..., place]
    return scores


def to_labels(probabilities: Floats, names: Sequence[str]) -> list[str | None]:
    """The N labels of probabilities (N, L); None for a row with NaN."""
    best = np.where(np.isnan(probabilities).any(axis=-1), -1, probabilities.argmax(axis=-1))
    return [None if label < 0 else names[label] for label in best.tolist()]


def to_sentiments(logits: NDArray[np.floating], labels: LabelSet = CARD) -> list[Sentiment | None]:
    """The N sentiments of logits (N, L); None where a logit is not finite."""
    finite = np.isfinite(logits).all(axis=-1)
    probabilities = to_probabilities(np.where(finite[:, None], logits, 0.0), labels.activation)
    sentiments: list[Sentiment | None] = [*sentiments_of(probabilities, labels)]
    for place in np.flatnonzero(~finite).tolist():
        sentiments[place] = None
    return sentiments


def sentiments_of(probabilities: Floats, labels: LabelSet) -> list[Sentiment]:
    """The N sentiments of probabilities (N, L), all of them numbers."""
    names = map(labels.names.__getitem__, probabilities.argmax(axis=-1).tolist())
    scores: Iterable[float | None] = repeat(None)
    if labels.weights is not None:
        scores = to_scores(probabilities, labels.weights).tolist()
    return named_tuples(Sentiment, names, scores, zip(*probabilities.T.tolist(), strict=True))
