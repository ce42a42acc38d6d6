"""Long texts in windows: how the tokens of a text are split, and what the answers to its windows come to. Pure."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np

from worker.core.batching import TokenIds
from worker.core.sentiment import Floats, LabelSet, Sentiment, sentiments_of

OVERLAP: Final = 64  # tokens that a window shares with the one before, so that no sentence is seen only in halves


class Window(NamedTuple):
    """A part of a text, as places among the text's tokens. ``new_tokens``: how many of them no earlier window has."""

    start: int
    end: int
    new_tokens: int


def windows_of(tokens: int, room: int, overlap: int) -> list[Window]:
    """The windows of a text of so many tokens: each has ``room`` tokens, the last one what is left.

    Each begins ``overlap`` tokens, which are fewer than ``room``, before the end of the one before. A text without tokens
    has one empty window.
    """
    starts = range(0, max(1, tokens - overlap), room - overlap)
    ends = [min(start + room, tokens) for start in starts]
    return [
        Window(start, end, end - start - (overlap if start else 0)) for start, end in zip(starts, ends, strict=True)
    ]


def combine(probabilities: Floats, new_tokens: Sequence[int]) -> Floats:
    """Probabilities (L) of a text from those of its windows (W, L): the mean, weighted by each window's new tokens (W).

    Those of a single window are returned as they are, to the last bit.
    """
    first: Floats = probabilities[0]
    return first if len(new_tokens) == 1 else np.average(probabilities, axis=0, weights=new_tokens)


class WindowedTexts(NamedTuple):
    """N texts in windows. ``ids`` and ``new_tokens``: of each window, text by text.

    ``bounds``: N + 1 places; the windows of text n are those from ``bounds[n]`` to ``bounds[n + 1]``.
    """

    ids: list[TokenIds]
    new_tokens: list[int]
    bounds: list[int]

    def combined(self, probabilities: Floats) -> Floats:
        """Probabilities (N, L) of the texts from those of the windows (W, L)."""
        texts = [combine(probabilities[begin:end], self.new_tokens[begin:end]) for begin, end in pairwise(self.bounds)]
        return np.array(texts).reshape(len(texts), probabilities.shape[1])

    def answers(self, of_windows: Sequence[Sentiment | str], labels: LabelSet) -> list[Sentiment | str]:
        """Answers of the texts from those of the windows, by the model's labels.

        A text with a window that failed has that window's failure.
        """
        answers: list[Sentiment | str] = []
        for begin, end in pairwise(self.bounds):
            scored = [each for each in of_windows[begin:end] if isinstance(each, Sentiment)]
            if len(scored) < end - begin:
                answers.append(next(each for each in of_windows[begin:end] if not isinstance(each, Sentiment)))
            elif len(scored) == 1:
                answers += scored
            else:
                probabilities = np.array([each.probabilities for each in scored])
                answers += sentiments_of(combine(probabilities, self.new_tokens[begin:end])[None], labels)
        return answers


class Windowing:
    """How the texts of one model are split into windows.

    ``max_tokens``: of a window, special tokens among them. ``opening`` and ``closing``: the number of special tokens before
    and behind a text, which each window has too. ``max_windows``: of a text at most.
    """

    def __init__(self, *, max_tokens: int, opening: int, closing: int, max_windows: int) -> None:
        self.max_tokens = max_tokens
        self._opening = opening
        self._closing = closing
        self._special = opening + closing
        self._room = max_tokens - self._special
        self._overlap = min(OVERLAP, self._room // 2)
        self.max_text_tokens = max_tokens + (max_windows - 1) * (self._room - self._overlap)
        """Tokens of a text that its windows hold at most, special ones among them."""

    def count(self, ids: TokenIds) -> int:
        """The number of windows of a text with these token ids."""
        return 1 + self._later_windows(len(ids) - self._special)

    def most_tokens(self, size: int) -> int:
        """The most tokens, those of all windows together, that a text of so many bytes may have: a token has a byte."""
        tokens = min(size, self.max_text_tokens - self._special)
        later = self._later_windows(tokens)
        return tokens + later * self._overlap + (1 + later) * self._special

    def split(self, ids: Sequence[TokenIds]) -> WindowedTexts:
        """The windows of N texts with these token ids. A text that fits into one window is that window."""
        windowed = WindowedTexts([], [], [0])
        for text in ids:
            windows = self._windows(text)
            windowed.ids.extend([text] if len(windows) == 1 else (self._cut(text, window) for window in windows))
            windowed.new_tokens.extend(window.new_tokens for window in windows)
            windowed.bounds.append(len(windowed.ids))
        return windowed

    def _later_windows(self, tokens: int) -> int:
        """How many windows a text of so many tokens has behind its first."""
        return max(0, -((self._room - tokens) // (self._room - self._overlap)))

    def _windows(self, ids: TokenIds) -> list[Window]:
        return windows_of(max(0, len(ids) - self._special), self._room, self._overlap)

    def _cut(self, ids: TokenIds, window: Window) -> TokenIds:
        own = ids[self._opening + window.start : self._opening + window.end]
        return np.concatenate([ids[: self._opening], own, ids[len(ids) - self._closing :]])
