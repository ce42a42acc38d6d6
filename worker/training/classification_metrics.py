"""Figures of a classifier: confusion matrix, F1, calibration error, and the interval of a difference. Pure: only numpy."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.intp]
"""Classes of N texts, as indices from 0."""

Matrix = NDArray[np.int64]
"""A K × K confusion matrix: rows are the true classes, columns the predicted ones."""

Floats = NDArray[np.float64]

Counts = NDArray[np.int64] | Floats

CALIBRATION_BINS = 15
RESAMPLES = 2000
RESAMPLING_SEED = 1
COUNTS_AT_ONCE = 2_000_000  # in samples, which are many where there are many classes


def confusion(truth: Sequence[int] | Ids, predicted: Sequence[int] | Ids, classes: int) -> Matrix:
    """The confusion matrix of N rows. Raises ValueError if ``truth`` and ``predicted`` have different lengths."""
    matrix = np.zeros((classes, classes), np.int64)
    if len(truth) != len(predicted):
        raise ValueError(f"{len(truth)} true classes cannot be compared with {len(predicted)} predicted ones")
    np.add.at(matrix, (np.asarray(truth, np.intp), np.asarray(predicted, np.intp)), 1)
    return matrix


def class_f1(matrix: Matrix) -> Floats:
    """F1 of each class, 2·TP / (2·TP + FP + FN), the harmonic mean of precision and recall; NaN for a class without rows.

    van Rijsbergen, Information Retrieval, 2nd ed. 1979, chapter 7 (F = 1 − E with equal weights).
    """
    return _f1(matrix.diagonal(), matrix.sum(1), matrix.sum(0))


def macro_f1(matrix: Matrix) -> float:
    """The mean F1 of the classes that have rows (a source may have none of a class); NaN without any row.

    The mean of F1s, not the F1 of mean precision and recall: Opitz and Burst, "Macro F1 and Macro F1", 2019.
    """
    return float(_mean_of_present(class_f1(matrix)))


def calibration_error(confidence: Floats, correct: NDArray[np.bool_], bins: int = CALIBRATION_BINS) -> float:
    """The expected calibration error of N answers, from 0 to 1; NaN if N is 0.

    Answers are put into bins of equal width by their confidence. Bin b reaches from b/bins to (b + 1)/bins; it includes
    its upper end, and the first bin also includes 0. The error is the sum over the bins of n/N · |share that is correct
    − mean confidence|, where n is the number of answers in the bin. Naeini, Cooper and Hauskrecht, AAAI 2015; Guo et
    al., ICML 2017, equation 3.

    ``confidence`` is the probability of the predicted label, 0 to 1. ``correct`` says whether that is the true one.
    """
    if not len(confidence):
        return float("nan")
    places = np.clip(np.ceil(confidence * bins).astype(np.intp) - 1, 0, bins - 1)
    gaps = np.bincount(places, weights=correct - confidence, minlength=bins)  # n · (share correct − mean confidence)
    return float(np.abs(gaps).sum() / len(confidence))


class Difference(NamedTuple):
    """A difference of macro-F1, and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def macro_f1_difference(truth: Ids, ours: Ids, theirs: Ids, classes: int, *, resamples: int = RESAMPLES) -> Difference:
    """Macro-F1 of `ours` minus that of `theirs`: two classifiers' answers to the same N ≥ 1 rows.

    The interval holds the middle 95 % of the differences on `resamples` samples of N rows, drawn with replacement; both
    classifiers are measured on the same sample (the paired bootstrap percentile interval: Efron and Tibshirani, An
    Introduction to the Bootstrap, 1993, chapter 13; Koehn, EMNLP 2004). The random seed is fixed.
    """
    # Rows with the same three classes are interchangeable, so a sample is drawn as how many it has of each kind.
    kinds, counts = np.unique(np.stack([truth, ours, theirs]), axis=1, return_counts=True)
    random, total = np.random.default_rng(RESAMPLING_SEED), counts.sum()

    def difference(of: NDArray[np.int64]) -> Floats:
        ours_f1, theirs_f1 = (_macro_f1_of_kinds(of, kinds[0], predicted, classes) for predicted in kinds[1:])
        return ours_f1 - theirs_f1

    at_once = max(1, COUNTS_AT_ONCE // len(counts))
    sizes = [min(at_once, resamples - begin) for begin in range(0, resamples, at_once)]
    of_samples = np.concatenate([difference(random.multinomial(total, counts / total, size)) for size in sizes])
    of_rows = difference(counts)
    low, high = np.quantile(of_samples, (0.025, 0.975))
    return Difference(float(of_rows), float(low), float(high))


def _macro_f1_of_kinds(counts: NDArray[np.int64], truth: Ids, predicted: Ids, classes: int) -> Floats:
    """Macro-F1 (…) of samples with `counts` (…, M) of M kinds of row, from the true and predicted class of each kind."""
    # Products of floats are those of the BLAS, many times as fast as those of integers, and exact up to 2^53 rows.
    is_true, is_predicted = ((np.arange(classes) == each[:, None]).astype(np.float64) for each in (truth, predicted))
    wide = counts.astype(np.float64)
    return _mean_of_present(_f1(wide @ (is_true * is_predicted), wide @ is_true, wide @ is_predicted))


def _f1(hits: Counts, true: Counts, predicted: Counts) -> Floats:
    """F1 (…, K) from the numbers (…, K) of rows that are right, of true rows and of predicted rows of each class."""
    return np.where(true > 0, 2 * hits / np.maximum(true + predicted, 1), np.nan)


def _mean_of_present(scores: Floats) -> Floats:
    """The mean over the last axis without the NaNs; NaN where there is nothing else."""
    present = ~np.isnan(scores)
    count = present.sum(-1)
    return np.where(count > 0, np.where(present, scores, 0.0).sum(-1) / np.maximum(count, 1), np.nan)
