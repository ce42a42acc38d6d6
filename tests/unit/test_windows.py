"""How long texts are split into windows, and what the answers to the windows come to, for any lengths."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from worker.core.sentiment import CARD, Sentiment, sentiments_of
from worker.core.windows import OVERLAP, Windowing, combine, windows_of

CLS, SEP = 2, 3
LENGTHS = st.integers(0, 3_000)
ROOMS = st.integers(1, 600).flatmap(lambda room: st.tuples(st.just(room), st.integers(0, room - 1)))
OPENINGS = st.integers(0, 2)
patient = settings(deadline=None)


def probabilities_of(count: int) -> st.SearchStrategy[list[tuple[float, ...]]]:
    return st.lists(st.tuples(*[st.floats(0, 1)] * 3), min_size=count, max_size=count)


def windowing(max_tokens: int = 512, opening: int = 1, closing: int = 1, max_windows: int = 8) -> Windowing:
    return Windowing(max_tokens=max_tokens, opening=opening, closing=closing, max_windows=max_windows)


def text_of(tokens: int, opening: int = 1, closing: int = 1) -> list[int]:
    """The ids of a text with so many tokens, all different, with special tokens around it."""
    return [CLS] * opening + list(range(10, 10 + tokens)) + [SEP] * closing


@given(LENGTHS, ROOMS)
def test_each_token_is_in_a_window_and_is_new_in_one(tokens: int, sizes: tuple[int, int]) -> None:
    room, overlap = sizes
    windows = windows_of(tokens, room, overlap)
    new = [place for start, end, count in windows for place in range(end - count, end)]
    assert new == list(range(tokens))
    assert sum(window.new_tokens for window in windows) == tokens


@given(LENGTHS, ROOMS)
def test_windows_are_full_but_for_the_last_and_overlap_as_wanted(tokens: int, sizes: tuple[int, int]) -> None:
    room, overlap = sizes
    windows = windows_of(tokens, room, overlap)
    assert [window.end - window.start for window in windows[:-1]] == [room] * (len(windows) - 1)
    assert windows[-1].end - windows[-1].start <= room
    assert [before.end - after.start for before, after in pairwise(windows)] == [overlap] * (len(windows) - 1)
    assert all(window.new_tokens for window in windows) or tokens == 0


def test_a_text_that_fits_has_one_window_and_a_token_more_makes_another() -> None:
    assert windows_of(510, 510, 64) == [(0, 510, 510)]
    assert windows_of(511, 510, 64) == [(0, 510, 510), (446, 511, 1)]
    assert windows_of(0, 510, 64) == [(0, 0, 0)]


@given(probabilities_of(1), LENGTHS)
def test_one_window_keeps_its_probabilities_to_the_last_bit(given: list[tuple[float, ...]], new_tokens: int) -> None:
    assert combine(np.array(given), [new_tokens]).tobytes() == np.array(given[0]).tobytes()


@patient
@given(st.integers(511, 3_500).flatmap(lambda n: st.tuples(st.just(n), probabilities_of(len(windows_of(n, 510, 64))))))
def test_probabilities_are_the_mean_over_new_tokens(case: tuple[int, list[tuple[float, ...]]]) -> None:
    tokens, given = case
    windows = windows_of(tokens, 510, 64)
    by_token = [answer for window, answer in zip(windows, given, strict=True) for _ in range(window.new_tokens)]
    combined = combine(np.array(given), [window.new_tokens for window in windows])
    assert_allclose(combined, np.mean(by_token, axis=0), rtol=1e-9, atol=1e-12)


@patient
@given(st.lists(st.integers(0, 1_500), max_size=6), st.integers(8, 600), OPENINGS, OPENINGS)
def test_each_window_of_a_text_is_a_text_of_its_own(
    lengths: list[int], max_tokens: int, opening: int, closing: int
) -> None:
    """It has the special tokens around it, no more tokens than the model takes, and the text's own in their order."""
    texts = [text_of(length, opening, closing) for length in lengths]
    split = windowing(max_tokens, opening, closing)
    windowed = split.split(texts)
    assert len(windowed.bounds) == len(texts) + 1
    assert windowed.bounds[-1] == len(windowed.ids) == len(windowed.new_tokens)
    for text, (begin, end) in zip(texts, pairwise(windowed.bounds), strict=True):
        windows = windowed.ids[begin:end]
        assert len(windows) == split.count(text)
        seen: list[int] = []
        for ids, new_tokens in zip(windows, windowed.new_tokens[begin:end], strict=True):
            assert len(ids) <= max_tokens
            assert list(ids[:opening]) == [CLS] * opening
            assert list(ids[len(ids) - closing :]) == [SEP] * closing
            own = list(ids[opening : len(ids) - closing])
            assert own[: len(own) - new_tokens] == seen[len(seen) - len(own) + new_tokens :]
            seen += own[len(own) - new_tokens :]
        assert seen == text[opening : len(text) - closing]


def test_a_text_of_one_window_is_that_window() -> None:
    text = text_of(510)
    assert windowing().split([text]).ids[0] is text


@given(st.integers(1, 12), st.integers(3, 600))
def test_so_many_tokens_fill_so_many_windows(max_windows: int, max_tokens: int) -> None:
    split = windowing(max_tokens, max_windows=max_windows)
    assert split.count(text_of(split.max_text_tokens - 2)) == max_windows
    assert split.count(text_of(split.max_text_tokens - 1)) == max_windows + 1


@patient
@given(st.integers(0, 5_000), st.integers(1, 5_000), st.integers(3, 600))
def test_no_text_has_more_tokens_than_its_bytes_allow(tokens: int, more: int, max_tokens: int) -> None:
    split = windowing(max_tokens)
    fits = min(tokens, split.max_text_tokens - 2)
    counted = sum(map(len, split.split([text_of(fits)]).ids))
    assert split.most_tokens(tokens) == counted
    assert split.most_tokens(tokens + more) >= counted


def test_a_model_that_takes_less_than_two_overlaps_halves_its_windows() -> None:
    windowed = windowing(max_tokens=42).split([text_of(100)])
    assert [len(ids) for ids in windowed.ids] == [42, 42, 42, 42]
    assert windowed.new_tokens == [40, 20, 20, 20]
    assert OVERLAP > 40


def test_texts_are_combined_each_from_its_own_windows() -> None:
    windowed = windowing().split([text_of(5), text_of(956), text_of(511)])  # of 1, 2 and 2 windows
    probabilities = np.array([[0.1, 0.2, 0.7], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.5, 0.5, 0.0]])
    texts = windowed.combined(probabilities)
    assert_array_equal(texts[0], probabilities[0])
    assert_allclose(texts[1], [510 / 956, 446 / 956, 0])
    assert_allclose(texts[2], [0.5 / 511, 0.5 / 511, 510 / 511])
    answers = windowed.answers(sentiments_of(probabilities, CARD), CARD)
    assert [answer.label for answer in answers if isinstance(answer, Sentiment)] == ["positive", "negative", "positive"]
    assert answers == sentiments_of(texts, CARD)
    assert windowing().split([]).combined(np.empty((0, 3))).shape == (0, 3)


@pytest.mark.parametrize("failed", [1, 2])
def test_a_window_that_fails_fails_its_text_alone(failed: int) -> None:
    windowed = windowing().split([text_of(5), text_of(956), text_of(511)])
    of_windows: list[Sentiment | str] = [*sentiments_of(np.full((5, 3), 0.5), CARD)]
    of_windows[failed] = "a logit is not finite"
    answers = windowed.answers(of_windows, CARD)
    assert answers[1] == "a logit is not finite"
    assert isinstance(answers[0], Sentiment)
    assert isinstance(answers[2], Sentiment)
