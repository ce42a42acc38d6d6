import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from worker.training import classification_metrics
from worker.training.classification_metrics import (
    calibration_error,
    class_f1,
    confusion,
    macro_f1,
    macro_f1_difference,
)

HAND_COUNTED = np.array([[3, 1, 0], [1, 2, 1], [0, 0, 2]])
CLASSES = st.integers(0, 3)

patient = settings(deadline=None)  # a busy machine breaks no promise


def test_f1_is_what_the_hand_computes() -> None:
    # negative: 3 of 4 found, 3 of 4 right; neutral: 2 of 4, 2 of 3; positive: 2 of 2, 2 of 3.
    assert class_f1(HAND_COUNTED) == pytest.approx([6 / 8, 4 / 7, 4 / 5])
    assert macro_f1(HAND_COUNTED) == pytest.approx((6 / 8 + 4 / 7 + 4 / 5) / 3)


def test_a_class_that_is_never_right_counts_as_zero_and_one_without_rows_not_at_all() -> None:
    assert macro_f1(np.array([[4, 0, 0], [4, 0, 0], [4, 0, 0]])) == pytest.approx((8 / 16) / 3)
    assert macro_f1(np.array([[3, 0, 1], [0, 0, 0], [0, 1, 3]])) == pytest.approx((6 / 7 + 6 / 8) / 2)
    assert np.isnan(macro_f1(np.zeros((3, 3), np.int64)))


def test_confusion_counts_true_rows_and_predicted_columns() -> None:
    assert confusion([0, 0, 1, 2], [0, 2, 1, 2], 3).tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 1]]
    with pytest.raises(ValueError, match="1 true classes cannot be compared with 2"):
        confusion([0], [0, 1], 2)


def f1_by_definition(truth: Sequence[int], predicted: Sequence[int], name: int) -> float:
    """The harmonic mean of precision and recall, row by row."""
    right = sum(t == p == name for t, p in zip(truth, predicted, strict=True))
    if not right:
        return 0.0
    precision, recall = right / list(predicted).count(name), right / list(truth).count(name)
    return 2 / (1 / precision + 1 / recall)


@patient
@given(st.lists(st.tuples(CLASSES, CLASSES), min_size=1))
def test_macro_f1_is_the_mean_of_harmonic_means_over_the_classes_that_are_there(rows: list[tuple[int, int]]) -> None:
    truth, predicted = zip(*rows, strict=True)
    expected = [f1_by_definition(truth, predicted, name) for name in sorted(set(truth))]
    assert macro_f1(confusion(truth, predicted, 4)) == pytest.approx(sum(expected) / len(expected))


# --- calibration ---


def test_calibration_error_is_what_the_hand_computes() -> None:
    # Two bins: 0.3 and 0.5 (mean 0.4, one of two right), and 0.9 (wrong): 2/3 · 0.1 + 1/3 · 0.9.
    assert calibration_error(np.array([0.3, 0.5, 0.9]), np.array([True, False, False]), bins=2) == pytest.approx(
        2 / 3 * 0.1 + 1 / 3 * 0.9
    )
    assert math.isnan(calibration_error(np.array([]), np.array([], np.bool_)))


@patient
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1), st.integers(1, 30))
def test_calibration_error_is_its_definition_in_each_bin(rows: list[tuple[float, bool]], bins: int) -> None:
    expected = 0.0
    for number in range(bins):
        inside = [(c, right) for c, right in rows if (max(1, math.ceil(c * bins)) == number + 1)]
        if inside:
            share = sum(right for _, right in inside) / len(inside)
            expected += len(inside) / len(rows) * abs(share - sum(c for c, _ in inside) / len(inside))
    confidence, correct = map(np.array, zip(*rows, strict=True))
    assert calibration_error(confidence, correct, bins) == pytest.approx(expected, abs=1e-9)
    assert 0 <= calibration_error(confidence, correct, bins) <= 1


@patient
@given(arrays.arrays(np.float64, st.integers(1, 50), elements=st.sampled_from([0.0, 1.0])))
def test_one_that_is_always_sure_and_right_is_calibrated(confidence: np.ndarray) -> None:
    assert calibration_error(confidence, confidence == 1.0) == 0


# --- the difference of two classifiers ---


def answers(rows: int, share_right: float, seed: int) -> np.ndarray:
    rng = random.Random(seed)
    return np.array([place % 3 if rng.random() < share_right else (place + 1) % 3 for place in range(rows)])


@patient
@given(st.lists(st.tuples(CLASSES, CLASSES, CLASSES), min_size=1, max_size=60))
def test_the_difference_is_that_of_the_macro_f1s_and_changes_sides_with_the_models(
    rows: list[tuple[int, int, int]],
) -> None:
    truth, ours, theirs = map(np.array, zip(*rows, strict=True))
    one, other = (macro_f1_difference(truth, *pair, 4, resamples=50) for pair in ((ours, theirs), (theirs, ours)))
    assert one.value == pytest.approx(macro_f1(confusion(truth, ours, 4)) - macro_f1(confusion(truth, theirs, 4)))
    assert one.value == pytest.approx(-other.value)
    assert -1 <= one.low <= one.high <= 1
    assert one == macro_f1_difference(truth, ours, theirs, 4, resamples=50)
    assert macro_f1_difference(truth, ours, ours, 4, resamples=50) == (0, 0, 0)


def test_the_interval_is_that_of_samples_drawn_row_by_row() -> None:
    truth, ours, theirs = np.arange(400) % 3, answers(400, 0.8, 1), answers(400, 0.75, 2)
    rng = np.random.default_rng(7)
    drawn = []
    for _ in range(2000):
        at = rng.integers(0, 400, 400)
        drawn.append(macro_f1(confusion(truth[at], ours[at], 3)) - macro_f1(confusion(truth[at], theirs[at], 3)))
    _, low, high = macro_f1_difference(truth, ours, theirs, 3)
    assert (low, high) == pytest.approx(np.quantile(drawn, (0.025, 0.975)), abs=0.01)


def test_a_clear_difference_is_told_from_chance() -> None:
    truth = np.arange(600) % 3
    assert macro_f1_difference(truth, answers(600, 0.9, 1), answers(600, 0.7, 2), 3).low > 0
    value, low, high = macro_f1_difference(truth, answers(600, 0.8, 1), answers(600, 0.8, 2), 3)
    assert low < value < high
    assert low < 0 < high


def test_rows_that_both_answer_alike_narrow_the_interval() -> None:
    truth, ours = np.arange(600) % 3, answers(600, 0.8, 1)
    theirs = ours.copy()
    theirs[:12] = (truth[:12] + 1) % 3
    paired = macro_f1_difference(truth, ours, theirs, 3)
    unpaired = macro_f1_difference(truth, ours, answers(600, 0.79, 2), 3)
    assert paired.high - paired.low < 0.5 * (unpaired.high - unpaired.low)


def test_samples_drawn_in_parts_give_the_same_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """With many classes not all of them fit into memory at once."""
    rng = np.random.default_rng(4)
    truth, ours, theirs = (rng.integers(0, 9, 400) for _ in range(3))
    whole = macro_f1_difference(truth, ours, theirs, 9)
    monkeypatch.setattr(classification_metrics, "COUNTS_AT_ONCE", 10_000)
    assert macro_f1_difference(truth, ours, theirs, 9) == whole
