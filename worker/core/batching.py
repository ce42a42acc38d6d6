"""Micro-batches: when one closes, what is in it, and how it is cut into device batches. Pure: the caller brings the time."""

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, islice, takewhile
from typing import Final, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

TokenIds = Sequence[int] | NDArray[np.int32]
"""The token ids of one text."""

ANY_PADDING: Final = 2**31 - 1
"""The ``pass_tokens`` of a device that pads nothing: texts of all lengths may share a pass."""

SourceT = TypeVar("SourceT", bound=Hashable)
ItemT = TypeVar("ItemT")
# A run of items of one source, when it arrived (s), and the tokens of each item if there is a limit
_Chunk = tuple[SourceT, Sequence[ItemT], float, list[int]]


@dataclass(frozen=True)
class TokenLimit(Generic[ItemT]):
    """Bounds micro-batches by tokens.

    ``tokens_of``: the most tokens that an item may have. ``at_most``: the tokens that a micro-batch may have, as of now.
    """

    tokens_of: Callable[[ItemT], int]
    at_most: Callable[[], float]


class MicroBatcher(Generic[SourceT, ItemT]):
    """Gathers items until ``max_items`` are there, or the oldest has waited ``linger_s`` seconds.

    With a ``token_limit`` a micro-batch also closes before the item that would exceed it; it always has one item.

    It never waits itself: ``closes_at`` says when the next micro-batch is due, and ``take`` takes it. What has piled up
    while the device was busy leaves at once, up to ``max_items``, for a device that is free takes all that fits.

    Items are taken in the order of their arrival. They belong to sources, in the worker to assigned partitions, so that
    those of a revoked partition can be discarded without touching the others.
    """

    def __init__(self, max_items: int, linger_s: float, token_limit: TokenLimit[ItemT] | None = None) -> None:
        self._max_items = max_items
        self._linger_s = linger_s
        self._token_limit = token_limit
        self._chunks: deque[_Chunk[SourceT, ItemT]] = deque()
        self._size = 0
        self._tokens = 0  # of all items; stays 0 without a limit

    def __len__(self) -> int:
        return self._size

    def add(self, source: SourceT, items: Sequence[ItemT], now: float) -> None:
        """Adds items of one source, in order, that arrived at ``now``, in seconds of a monotonic clock."""
        if items:
            tokens = list(map(self._token_limit.tokens_of, items)) if self._token_limit else []
            self._chunks.append((source, items, now, tokens))
            self._size += len(items)
            self._tokens += sum(tokens)

    def oldest_arrival(self) -> float | None:
        """When the oldest item arrived, on the clock of ``add``; None if there is none."""
        return self._chunks[0][2] if self._chunks else None

    def closes_at(self) -> float | None:
        """When the next micro-batch is due; in the past if it is full; None if there is none."""
        arrived = self.oldest_arrival()
        if arrived is None:
            return None
        return arrived if self._size >= self._max_items or self._exceeds_limit() else arrived + self._linger_s

    def take(self) -> list[tuple[SourceT, list[ItemT]]]:
        """Takes the oldest items, as many as a micro-batch may have, as runs of one source each, in order of arrival."""
        size = room = self._next_size()
        taken: list[tuple[SourceT, list[ItemT]]] = []
        while self._chunks and room:
            source, items, arrived, tokens = self._chunks.popleft()
            run = items[:room]
            self._tokens -= sum(tokens[:room])
            if len(items) > room:
                self._chunks.appendleft((source, items[room:], arrived, tokens[room:]))
            room -= len(run)
            if taken and taken[-1][0] == source:
                taken[-1][1].extend(run)
            else:
                taken.append((source, list(run)))
        self._size -= size
        return taken

    def _next_size(self) -> int:
        """How many items the next micro-batch has."""
        most = min(self._size, self._max_items)
        if self._token_limit is None or not self._exceeds_limit():
            return most
        in_order = chain.from_iterable(tokens for _, _, _, tokens in self._chunks)
        total, most_tokens = accumulate(islice(in_order, most)), self._token_limit.at_most()
        return max(1, sum(1 for _ in takewhile(most_tokens.__ge__, total)))

    def _exceeds_limit(self) -> bool:
        return self._token_limit is not None and self._tokens > self._token_limit.at_most()

    def discard(self, source: SourceT) -> list[ItemT]:
        """Removes all items of a source, and answers with them."""
        dropped = [item for owner, items, _, _ in self._chunks if owner == source for item in items]
        self._chunks = deque(chunk for chunk in self._chunks if chunk[0] != source)
        self._size -= len(dropped)
        self._tokens = sum(sum(tokens) for _, _, _, tokens in self._chunks)
        return dropped


def cut_by_length(
    lengths: Sequence[int], max_tokens: int, pass_tokens: int, widths: Sequence[int] = ()
) -> list[list[int]]:
    """Cuts N texts into device batches, each of at most ``max_tokens`` tokens when padded to its longest text.

    ``lengths`` are the texts' tokens. The answer is a list of device batches, each a list of indices into ``lengths``, in
    which every index occurs once. A text longer than ``max_tokens`` goes alone. The longest texts come first, so that a
    device with too little memory fails at once.

    ``pass_tokens`` is how many tokens the device computes in the time that one more pass costs; a device batch ends where
    its padding would exceed that. ``widths``, ascending, are the lengths that the device pads to, where it has fixed ones.
    """
    tokens = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-tokens, kind="stable")
    sizes = np.maximum(1, tokens)
    padded = sizes[order]
    if widths:
        padded = np.append(np.asarray(widths), sizes.max(initial=1))[np.searchsorted(widths, padded)]
    return _cut_by_width(order.tolist(), padded, max_tokens, pass_tokens)


def _cut_by_width(order: list[int], padded: NDArray[np.int64], max_tokens: int, pass_tokens: int) -> list[list[int]]:
    batches: list[list[int]] = []
    begin, width, padding = 0, 0, 0
    borders = [*(np.flatnonzero(np.diff(padded)) + 1).tolist(), len(order)]
    for end in borders if order else []:
        own = int(padded[begin])
        padding += (end - begin) * (width - own)
        if batches and padding <= pass_tokens and (len(batches[-1]) + end - begin) * width <= max_tokens:
            batches[-1].extend(order[begin:end])
        else:
            width, padding = own, 0
            texts = max(1, max_tokens // own)
            batches.extend(order[first : min(first + texts, end)] for first in range(begin, end, texts))
        begin = end
    return batches
