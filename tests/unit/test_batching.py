"""What the batcher promises of any sequence of arrivals, and the cut of any lengths."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from worker.core.batching import MicroBatcher, TokenLimit, cut_by_length

SOURCES = ("a", "b", "c")
LENGTHS = st.lists(st.integers(0, 600), max_size=80)
BUDGETS = st.integers(1, 2_000)
PASS_TOKENS = st.integers(0, 1_000)
patient = settings(deadline=None)  # a busy machine breaks no promise


class AnyUse(RuleBasedStateMachine):
    """The batcher beside a plain list of what waits: (source, item, time of arrival), oldest first."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[tuple[str, int, float]] = []
        self.now = 0.0
        self.next_item = 0

    @initialize(max_items=st.integers(1, 12), linger_s=st.floats(0, 60), is_limited=st.booleans())
    def start(self, max_items: int, linger_s: float, is_limited: bool) -> None:
        self.max_items, self.linger_s, self.is_limited, self.most_tokens = max_items, linger_s, is_limited, 20.0
        limit = TokenLimit[int](tokens_of, lambda: self.most_tokens) if is_limited else None
        self.batcher = MicroBatcher[str, int](max_items, linger_s, limit)

    @rule(most_tokens=st.floats(0, 60))
    def move_limit(self, most_tokens: float) -> None:
        self.most_tokens = most_tokens

    def next_size(self) -> int:
        """As many of the oldest items as are allowed, in number and in tokens; one in any case."""
        items = [item for _, item, _ in self.waiting[: self.max_items]]
        while self.is_limited and len(items) > 1 and sum(map(tokens_of, items)) > self.most_tokens:
            items.pop()
        return len(items)

    @rule(source=st.sampled_from(SOURCES), count=st.integers(0, 15), seconds=st.floats(0, 100))
    def add(self, source: str, count: int, seconds: float) -> None:
        self.now += seconds
        items = range(self.next_item, self.next_item + count)
        self.next_item += count
        self.batcher.add(source, items, self.now)
        self.waiting += [(source, item, self.now) for item in items]

    @rule()
    def take(self) -> None:
        runs = self.batcher.take()
        size = self.next_size()
        expected, self.waiting = self.waiting[:size], self.waiting[size:]
        taken = [(source, item) for source, items in runs for item in items]
        assert taken == [(source, item) for source, item, _ in expected]
        assert all(items for _, items in runs)
        assert all(before != after for (before, _), (after, _) in pairwise(runs))

    @rule(source=st.sampled_from((*SOURCES, "never seen")))
    def discard(self, source: str) -> None:
        expected = [item for owner, item, _ in self.waiting if owner == source]
        self.waiting = [each for each in self.waiting if each[0] != source]
        assert self.batcher.discard(source) == expected

    @invariant()
    def it_knows_its_size(self) -> None:
        assert len(self.batcher) == len(self.waiting)

    @invariant()
    def it_knows_its_oldest(self) -> None:
        assert self.batcher.oldest_arrival() == (self.waiting[0][2] if self.waiting else None)

    @invariant()
    def it_closes_at_linger_after_the_oldest_or_at_once_when_full(self) -> None:
        closes_at = self.batcher.closes_at()
        if not self.waiting:
            assert closes_at is None
        elif len(self.waiting) >= self.max_items or self.exceeds_limit():
            assert closes_at is not None
            assert closes_at <= self.now
        else:
            assert closes_at == self.waiting[0][2] + self.linger_s

    def exceeds_limit(self) -> bool:
        return self.is_limited and sum(tokens_of(item) for _, item, _ in self.waiting) > self.most_tokens


def tokens_of(item: int) -> int:
    return item % 7 * 3


TestAnyUse = AnyUse.TestCase
TestAnyUse.settings = patient


def test_a_lone_item_waits_its_linger_and_no_longer_for_those_that_follow() -> None:
    batcher = MicroBatcher[str, int](max_items=10, linger_s=0.5)
    assert batcher.closes_at() is None
    batcher.add("a", [1], now=100.0)
    assert batcher.closes_at() == 100.5
    batcher.add("b", [2], now=100.4)
    assert batcher.closes_at() == 100.5


def test_a_full_batch_is_due_at_once_and_the_rest_lingers_from_its_own_arrival() -> None:
    batcher = MicroBatcher[str, int](max_items=2, linger_s=0.5)
    batcher.add("a", [1], now=100.0)
    batcher.add("a", [2, 3], now=100.2)
    assert batcher.closes_at() == 100.0
    assert batcher.take() == [("a", [1, 2])]
    assert batcher.closes_at() == pytest.approx(100.7)


def test_no_items_start_no_linger() -> None:
    batcher = MicroBatcher[str, int](max_items=2, linger_s=0.5)
    batcher.add("a", [], now=1.0)
    assert batcher.closes_at() is None
    assert batcher.take() == []


def test_a_batch_is_runs_of_one_source_in_order_of_arrival() -> None:
    batcher = MicroBatcher[str, int](max_items=6, linger_s=0.0)
    for source, items in (("a", [1, 2]), ("a", [3]), ("b", [4]), ("a", [5, 6, 7])):
        batcher.add(source, items, now=0.0)
    assert batcher.take() == [("a", [1, 2, 3]), ("b", [4]), ("a", [5, 6])]
    assert batcher.take() == [("a", [7])]


def test_a_source_that_is_gone_takes_its_own_items_with_it() -> None:
    batcher = MicroBatcher[str, int](max_items=10, linger_s=1.0)
    batcher.add("gone", [1], now=0.0)
    batcher.add("kept", [2, 3], now=5.0)
    batcher.add("gone", [4], now=6.0)
    assert batcher.discard("gone") == [1, 4]
    assert batcher.closes_at() == 6.0
    assert batcher.take() == [("kept", [2, 3])]
    assert len(batcher) == 0


def test_a_batch_ends_before_the_item_that_has_too_many_tokens() -> None:
    batcher = MicroBatcher[str, int](10, 1.0, TokenLimit(lambda item: item, lambda: 100.0))
    batcher.add("a", [60, 40], now=0.0)
    assert batcher.closes_at() == 1.0, "all that is there is within the limit"
    batcher.add("b", [1, 500, 2], now=0.5)
    assert batcher.closes_at() == 0.0
    assert batcher.take() == [("a", [60, 40])]
    assert batcher.take() == [("b", [1])]
    assert batcher.take() == [("b", [500])], "what exceeds it by itself goes alone"
    assert batcher.closes_at() == 1.5
    assert batcher.take() == [("b", [2])]


@patient
@given(LENGTHS, BUDGETS, PASS_TOKENS)
def test_each_text_is_cut_into_one_device_batch_once(lengths: list[int], max_tokens: int, pass_tokens: int) -> None:
    batches = cut_by_length(lengths, max_tokens, pass_tokens)
    assert Counter(index for batch in batches for index in batch) == Counter(range(len(lengths)))
    assert all(batches)


@patient
@given(LENGTHS, BUDGETS, PASS_TOKENS)
def test_a_padded_device_batch_is_within_the_budget_unless_it_is_one_text(
    lengths: list[int], max_tokens: int, pass_tokens: int
) -> None:
    for batch in cut_by_length(lengths, max_tokens, pass_tokens):
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= max_tokens


@patient
@given(LENGTHS, BUDGETS, PASS_TOKENS)
def test_texts_go_longest_first_within_and_over_device_batches(
    lengths: list[int], max_tokens: int, pass_tokens: int
) -> None:
    order = [lengths[index] for batch in cut_by_length(lengths, max_tokens, pass_tokens) for index in batch]
    assert order == sorted(lengths, reverse=True)


@patient
@given(LENGTHS, BUDGETS, PASS_TOKENS)
def test_a_device_batch_pads_no_more_than_a_pass_costs(lengths: list[int], max_tokens: int, pass_tokens: int) -> None:
    for batch in cut_by_length(lengths, max_tokens, pass_tokens):
        longest = max(1, lengths[batch[0]])
        assert sum(longest - max(1, lengths[index]) for index in batch) <= pass_tokens


@patient
@given(LENGTHS, BUDGETS, PASS_TOKENS)
def test_no_device_batch_is_closed_while_the_next_length_still_fits_and_pays(
    lengths: list[int], max_tokens: int, pass_tokens: int
) -> None:
    batches = cut_by_length(lengths, max_tokens, pass_tokens)
    sizes = [max(1, length) for length in lengths]
    for batch, following in pairwise(batches):
        width, next_width = sizes[batch[0]], sizes[following[0]]
        others = sum(sizes[index] == next_width for index in following)  # those of one length go together
        padding = sum(width - sizes[index] for index in batch)
        is_full = (len(batch) + others) * width > max_tokens
        assert is_full or padding + others * (width - next_width) > pass_tokens


@patient
@given(st.integers(0, 50), BUDGETS)
def test_texts_without_tokens_are_cut_too(count: int, max_tokens: int) -> None:
    batches = cut_by_length([0] * count, max_tokens, 1)
    assert sum(map(len, batches)) == count
    assert all(len(batch) <= max_tokens for batch in batches)


def test_equal_lengths_keep_their_order() -> None:
    assert cut_by_length([3, 5, 3, 5, 3], 10, 0) == [[1, 3], [0, 2, 4]]


WIDTHS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


@patient
@given(LENGTHS, BUDGETS, PASS_TOKENS)
def test_with_widths_each_text_is_still_cut_once_and_within_the_budget(
    lengths: list[int], max_tokens: int, pass_tokens: int
) -> None:
    batches = cut_by_length(lengths, max_tokens, pass_tokens, WIDTHS)
    assert Counter(index for batch in batches for index in batch) == Counter(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        width = next((width for width in WIDTHS if width >= longest), longest)
        assert len(batch) == 1 or len(batch) * width <= max_tokens


def test_a_width_with_many_texts_is_kept_apart_and_one_with_few_joins_the_longer() -> None:
    many, few = [500] + [60] * 100, [500] + [60] * 2
    assert list(map(len, cut_by_length(many, 65_536, 2_048, WIDTHS))) == [1, 100]
    assert list(map(len, cut_by_length(few, 65_536, 2_048, WIDTHS))) == [3]
