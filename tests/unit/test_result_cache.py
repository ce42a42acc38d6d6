"""The cache of results: what it keeps, what it frees, and that it gives back what was put."""

import gc

from hypothesis import given, settings
from hypothesis import strategies as st

from worker.core.sentiment import LABELS, LabelSet, Sentiment
from worker.pipeline.result_cache import ResultCache

SENTIMENT = Sentiment("neutral", 0.0, (0.1, 0.8, 0.1))
SIZES = st.integers(0, 9)
USES = st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=60)


@settings(deadline=None)
@given(SIZES, USES)
def test_the_newest_half_is_found_and_no_more_than_all_is_kept(size: int, uses: list[tuple[bool, int]]) -> None:
    cache = ResultCache(size)
    newest: list[int] = []
    for is_put, number in uses:
        digest = bytes([number])
        if is_put:
            cache.put(digest, SENTIMENT, bool(number % 2), number)
        elif cache.get(digest) is None:
            assert number not in newest[-(size // 2) :] or not size // 2
            continue
        newest = [*(each for each in newest if each != number), number]
        assert len(cache._young) + len(cache._old) <= (2 if size == 1 else size)
        assert len(cache._to_free) <= size
    if not size:
        assert not cache._young
    else:
        for number in newest[-max(1, size // 2) :]:
            assert cache.get(bytes([number])) == (SENTIMENT, bool(number % 2), number)


def test_a_generation_that_goes_is_gone_before_the_next_one_does() -> None:
    cache = ResultCache(100)
    for number in range(150):
        cache.put(bytes([number]), SENTIMENT, False)
    assert len(cache._to_free) == 0
    cache.put(bytes([150]), SENTIMENT, False)
    assert len(cache._to_free) == 48


def test_what_is_put_twice_drives_nothing_out() -> None:
    cache = ResultCache(4)
    for name in (b"a", b"b", b"c", b"d", b"d", b"d"):
        cache.put(name, SENTIMENT, False)
    assert set(cache._old) | set(cache._young) == {b"a", b"b", b"c", b"d"}


@given(st.sampled_from(LABELS), st.tuples(*[st.floats(0, 1)] * 3), st.floats(-1, 1), st.booleans(), st.integers(1, 64))
def test_what_is_found_is_what_was_put(
    label: str, probabilities: tuple[float, float, float], score: float, truncated: bool, windows: int
) -> None:
    cache = ResultCache(2)
    cache.put(b"a", Sentiment(label, score, probabilities), truncated, windows)
    found = cache.get(b"a")
    assert found == (Sentiment(label, score, probabilities), truncated, windows)
    assert type(found[0]) is Sentiment
    assert type(found[1]) is bool


@given(st.integers(1, 400).flatmap(lambda count: st.tuples(st.just(count), st.integers(0, count - 1))), st.booleans())
def test_any_number_of_labels_is_kept_with_and_without_a_score(place: tuple[int, int], has_score: bool) -> None:
    count, best = place
    names = tuple(f"label {number}" for number in range(count))
    cache = ResultCache(2, LabelSet(names, "sigmoid", (0.5,) * count if has_score else None))
    sentiment = Sentiment(names[best], 0.5 if has_score else None, tuple(number / count for number in range(count)))
    cache.put(b"a", sentiment, True)
    assert cache.get(b"a") == (sentiment, True, 1)


def test_the_garbage_collector_has_no_entries_to_walk_through() -> None:
    cache = ResultCache(2)
    cache.put(b"a", SENTIMENT, False)
    assert not any(map(gc.is_tracked, (*cache._young, *cache._young.values())))
