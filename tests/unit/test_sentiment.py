"""The arithmetic of the model card, and logits that are no use."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from worker.core.sentiment import CARD as CARD_SET
from worker.core.sentiment import LABELS, LabelSet, to_labels, to_probabilities, to_scores, to_sentiments

CARD = (0.7870447, 0.4947824, 0.19755007)
pytestmark = pytest.mark.filterwarnings("error")


def logits_of(*rows: tuple[float, ...]) -> NDArray[np.float64]:
    """The logits whose sigmoids these are."""
    wanted = np.array(rows, dtype=np.float64)
    return np.log(wanted / (1 - wanted))


def test_the_cards_example() -> None:
    (sentiment,) = to_sentiments(logits_of(CARD))
    assert sentiment is not None
    assert sentiment.label == "negative"
    assert sentiment.score == pytest.approx(-0.5894946, abs=1e-6)
    assert sentiment.probabilities == pytest.approx(CARD, abs=1e-9)


def test_the_cards_example_in_the_networks_own_precision() -> None:
    (sentiment,) = to_sentiments(logits_of(CARD).astype(np.float32))
    assert sentiment is not None
    assert (sentiment.label, sentiment.score) == ("negative", pytest.approx(-0.5894946, abs=1e-6))


def test_probabilities_are_sigmoids_each_by_itself() -> None:
    assert to_probabilities(np.zeros(3)).tolist() == [0.5, 0.5, 0.5]
    assert to_probabilities(np.array([0.0, 0.0, 8.0]))[:2].tolist() == [0.5, 0.5]
    logits = np.linspace(-20, 20, 81)
    assert to_probabilities(logits) == pytest.approx(1 / (1 + np.exp(-logits)), rel=1e-12)


def test_softmax_is_an_option() -> None:
    logits = np.array([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    powers = np.exp(logits)
    assert to_probabilities(logits, "softmax") == pytest.approx(powers / powers.sum(axis=1, keepdims=True), rel=1e-12)
    (first, second) = to_sentiments(logits, CARD_SET._replace(activation="softmax"))
    assert first is not None
    assert second is not None
    assert sum(first.probabilities) == pytest.approx(1)
    assert first.score == pytest.approx((np.e**3 - np.e) / (np.e + np.e**2 + np.e**3))
    assert second.score == 0


def test_extreme_logits_neither_overflow_nor_warn() -> None:
    logits = np.array([[1e4, -1e4, 0.0], [-1e4, 0.0, 1e4]])
    assert to_probabilities(logits).tolist() == [[1.0, 0.0, 0.5], [0.0, 0.5, 1.0]]
    assert to_probabilities(logits, "softmax").tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    assert [sentiment and sentiment.score for sentiment in to_sentiments(logits)] == [-0.5, 1.0]


def test_a_small_probability_keeps_its_digits() -> None:
    assert to_probabilities(np.array([-40.0]))[0] == pytest.approx(np.exp(-40.0), rel=1e-9)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", [0, 1, 2])
def test_a_logit_that_is_not_finite_is_no_answer_for_its_row_alone(bad: float, column: int) -> None:
    logits = logits_of(CARD, CARD, CARD)
    alone = to_sentiments(logits_of(CARD))[0]
    logits[1, column] = bad
    assert to_sentiments(logits, CARD_SET._replace(activation="softmax"))[1] is None
    assert to_sentiments(logits) == [alone, None, alone]


def test_the_label_is_that_of_the_largest_probability() -> None:
    rows = np.array([[3.0, 1.0, 2.0], [1.0, 3.0, 2.0], [1.0, 2.0, 3.0], [-3.0, -1.0, -2.0]])
    labels = [sentiment and sentiment.label for sentiment in to_sentiments(rows)]
    assert labels == ["negative", "neutral", "positive", "neutral"]
    assert LABELS == ("negative", "neutral", "positive")


def test_the_score_is_positive_less_negative_whatever_the_neutral() -> None:
    probabilities = np.array([[0.1, 0.9, 0.4], [0.6, 0.0, 0.1], [0.5, 0.5, 0.5]])
    assert to_scores(probabilities, [-1, 0, 1]).tolist() == (probabilities[:, 2] - probabilities[:, 0]).tolist()


def test_half_precision_comes_out_in_plain_python_numbers() -> None:
    (sentiment,) = to_sentiments(np.array([[1.0, 0.0, -1.0]], dtype=np.float16))
    assert sentiment is not None
    assert [type(number) for number in (sentiment.score, *sentiment.probabilities)] == [float] * 4
    assert sentiment.score == pytest.approx(-0.4621171573)


def test_no_rows_no_sentiments() -> None:
    assert to_sentiments(np.empty((0, 3), dtype=np.float32)) == []


# --- Any labels ---


LOGITS = st.integers(1, 12).flatmap(
    lambda count: st.tuples(
        st.lists(st.lists(st.floats(-30, 30), min_size=count, max_size=count), min_size=1, max_size=6),
        st.none() | st.lists(st.floats(-5, 5), min_size=count, max_size=count).map(tuple),
        st.sampled_from(["sigmoid", "softmax"]),
    )
)


@given(LOGITS)
def test_any_labels_and_weights_are_what_plain_arithmetic_says(drawn: Any) -> None:
    rows, weights, activation = drawn
    names = tuple(f"label {number}" for number in range(len(rows[0])))
    for row, sentiment in zip(rows, to_sentiments(np.array(rows), LabelSet(names, activation, weights)), strict=True):
        assert sentiment is not None
        powers = [float(np.exp(logit)) for logit in row]
        whole = [1 + power for power in powers] if activation == "sigmoid" else [sum(powers)] * len(powers)
        wanted = [power / of for power, of in zip(powers, whole, strict=True)]
        assert sentiment.probabilities == pytest.approx(wanted, rel=1e-9)
        assert sentiment.probabilities[names.index(sentiment.label)] == max(sentiment.probabilities)
        if weights is None:
            assert sentiment.score is None
        else:
            score = sum(weight * each for weight, each in zip(weights, wanted, strict=True))
            assert sentiment.score == pytest.approx(score, abs=1e-9)


@given(LOGITS)
def test_a_texts_sentiment_does_not_depend_on_its_neighbours(drawn: Any) -> None:
    rows, weights, activation = drawn
    labels = LabelSet(tuple(map(str, range(len(rows[0])))), activation, weights)
    assert to_sentiments(np.array(rows), labels) == [to_sentiments(np.array([row]), labels)[0] for row in rows]


def test_labels_by_name_and_none_for_a_row_that_is_no_number() -> None:
    assert to_labels(np.array([[0.2, 0.8], [np.nan, 0.1], [0.9, 0.1]]), ["a", "b"]) == ["b", None, "a"]
