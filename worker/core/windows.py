"""Splits the tokens of a long text into windows, and combines the answers to the windows into one for the text. Pure."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np

from worker.core.batching import TokenIds
from worker.core.sentiment import Floats, LabelSet, Sentiment, sentiments_of

OVERLAP: Final = 64  # tokens that a window shares with the one before, so that a short sentence is whole in one of them


class Window(NamedTuple):
    """A part of a text: its tokens from ``start`` to before ``end``. No earlier window has ``new_tokens`` of them."""

    start: int
    end: int
    new_tokens: int


def windows_of(tokens: int, room: int, overlap: int) -> list[Window]:
    """The windows of a text that has ``tokens`` tokens. Each window has ``room`` tokens; the last one has what is left.

    Each window begins ``overlap`` tokens before the end of the window before it; ``overlap`` is less than ``room``. A text
    without tokens has one empty window.
    """
    starts = range(0, max(1, tokens - overlap), room - overlap)
    ends = [min(start + room, tokens) for start in starts]
    return [
        Window(start, end, end - start - (overlap if start else 0)) for start, end in zip(starts, ends, strict=True)
    ]


def combine(probabilities: Floats, new_tokens: Sequence[int]) -> Floats:
    """The probabilities (L) of a text, from those of its windows (W, L): the mean, weighted by the new tokens (W).

    A text with a single window gets the probabilities of that window, unchanged to the last bit.
    """
    first: Floats = probabilities[0]
    return first if len(new_tokens) == 1 else np.average(probabilities, axis=0, weights=new_tokens)


class WindowedTexts(NamedTuple):
    """N texts in windows. ``ids`` and ``new_tokens`` have one entry for each window, text by text.

    ``bounds`` has N + 1 indexes into them: text n has the windows from ``bounds[n]`` up to, but without, ``bounds[n + 1]``.
    """

    ids: list[TokenIds]
    new_tokens: list[int]
    bounds: list[int]

    def combined(self, probabilities: Floats) -> Floats:
        """The probabilities (N, L) of the texts, from those of all windows (W, L)."""
        texts = [combine(probabilities[begin:end], self.new_tokens[begin:end]) for begin, end in pairwise(self.bounds)]
        return np.array(texts).reshape(len(texts), probabilities.shape[1])

    def answers(self, of_windows: Sequence[Sentiment | str], labels: LabelSet) -> list[Sentiment | str]:
        """The answers to the N texts, from those to all windows. ``labels`` are the model's.

        An answer is a sentiment, or the message of a failure. If a window of a text failed, the text has that failure.
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
    """Splits texts into windows for one model.

    A window has at most ``max_tokens`` tokens, special tokens included. ``opening`` and ``closing`` are the numbers of
    special tokens before and behind a text; each window has these tokens, too. A text has at most ``max_windows``
    windows.
    """

    def __init__(self, *, max_tokens: int, opening: int, closing: int, max_windows: int) -> None:
        self.max_tokens = max_tokens
        self._opening = opening
        self._closing = closing
        self._special = opening + closing
        self._room = max_tokens - self._special
        self._overlap = min(OVERLAP, self._room // 2)
        self.max_text_tokens = max_tokens + (max_windows - 1) * (self._room - self._overlap)
        """The most tokens of a text that ``max_windows`` windows hold, special tokens included."""

    def count(self, ids: TokenIds) -> int:
        """How many windows a text with these token ids has."""
        return 1 + self._later_windows(len(ids) - self._special)

    def most_tokens(self, size: int) -> int:
        """The most tokens that all windows of a text of ``size`` bytes may have together: a token has at least one byte."""
        tokens = min(size, self.max_text_tokens - self._special)
        later = self._later_windows(tokens)
        return tokens + later * self._overlap + (1 + later) * self._special

    def split(self, ids: Sequence[TokenIds]) -> WindowedTexts:
        """Splits N texts, given as token ids. A text that fits into one window stays as it is."""
        windowed = WindowedTexts([], [], [0])
        for text in ids:
            windows = self._windows(text)
            windowed.ids.extend([text] if len(windows) == 1 else (self._cut(text, window) for window in windows))
            windowed.new_tokens.extend(window.new_tokens for window in windows)
            windowed.bounds.append(len(windowed.ids))
        return windowed

    def _later_windows(self, tokens: int) -> int:
        """How many windows a text of ``tokens`` tokens has behind its first one."""
        return max(0, -((self._room - tokens) // (self._room - self._overlap)))

    def _windows(self, ids: TokenIds) -> list[Window]:
        return windows_of(max(0, len(ids) - self._special), self._room, self._overlap)

    def _cut(self, ids: TokenIds, window: Window) -> TokenIds:
        own = ids[self._opening + window.start : self._opening + window.end]
        return np.concatenate([ids[: self._opening], own, ids[len(ids) - self._closing :]])
