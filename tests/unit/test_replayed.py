"""What has been replayed, against a plain set of offsets and reasons."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.replayed import METADATA_BYTES, Replayed, TooManySpans, joined

REASONS = ("invalid_json", "empty_text", "too_large")
SIZE = 40
SPANS = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE))
REPLAYS = st.lists(st.tuples(SPANS, st.sets(st.sampled_from(REASONS))), max_size=12)


@given(REPLAYS, st.integers(0, SIZE))
def test_it_knows_what_has_been_replayed_also_after_a_commit(
    replays: list[tuple[tuple[int, int], set[str]]], begin: int
) -> None:
    state = Replayed(begin)
    done = {(offset, reason) for offset in range(begin) for reason in REASONS}
    for (start, end), reasons in replays:
        state.add(start, end, reasons)
        done |= {(offset, reason) for offset in range(start, end) for reason in reasons or REASONS}
        state = Replayed.read(state.offset, state.metadata())
    for offset in range(SIZE + 1):
        for reason in REASONS:
            assert state.has(offset, reason) == ((offset, reason) in done)
    assert all((offset, reason) in done for offset in range(state.offset) for reason in REASONS)


@given(st.lists(SPANS))
def test_joined_spans_hold_the_same_offsets_and_never_touch(spans: list[tuple[int, int]]) -> None:
    found = joined(spans)
    assert {o for begin, end in found for o in range(begin, end)} == {
        o for begin, end in spans for o in range(begin, end)
    }
    assert all(one[1] < other[0] for one, other in pairwise(found))


def test_what_the_topic_has_lost_is_forgotten() -> None:
    state = Replayed(0)
    state.add(5, 10, ["empty_text"])
    state.forget_before(20)
    assert (state.offset, state.metadata()) == (20, "")


@pytest.mark.parametrize("metadata", ["", "of another tool", "empty_text=1-", "=", "a=1-2;;", "a=1-2,"])
def test_metadata_of_others_counts_as_none(metadata: str) -> None:
    assert not Replayed.read(0, metadata).has(1, "a")


def test_a_state_that_no_commit_holds_is_refused() -> None:
    state = Replayed(0)
    for begin in range(1, METADATA_BYTES, 2):
        state.add(begin, begin + 1)
    with pytest.raises(TooManySpans):
        state.metadata()
