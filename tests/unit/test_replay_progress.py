"""What has been replayed, against a plain set of offsets and reasons."""

import re
from itertools import pairwise
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.core.replay_progress import METADATA_BYTES, Replayed, TooManySpans, joined
from worker.reasons import Reason

REASONS = ("invalid_json", "invalid_utf8", "too_large")
SIZE = 40
SPANS = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE))
KEPT_BACK = st.sets(st.integers(0, SIZE), max_size=4)
REPLAYS = st.lists(st.tuples(SPANS, st.sets(st.sampled_from(REASONS)), KEPT_BACK), max_size=12)
EARLIER = re.compile(r"(?:[a-z_*]+=\d+-\d+(?:,\d+-\d+)*(?:;|$))*")


@given(REPLAYS, st.integers(0, SIZE))
def test_it_knows_what_has_been_replayed_also_after_a_commit(
    replays: list[tuple[tuple[int, int], set[str], set[int]]], begin: int
) -> None:
    state = Replayed(begin)
    done = {(offset, reason) for offset in range(begin) for reason in REASONS}
    for (start, end), reasons, unknown in replays:
        kept_back = {offset for offset in unknown if start <= offset < end}
        state.add(start, end, reasons, kept_back)
        offsets = set(range(start, end)) - kept_back
        done |= {(offset, reason) for offset in offsets for reason in reasons or REASONS}
        assert EARLIER.fullmatch(state.metadata()), "a version before can go on"
        state = Replayed.read(state.offset, state.metadata())
    for offset in range(SIZE + 1):
        for reason in REASONS:
            assert state.has(offset, reason) == ((offset, reason) in done)
    assert all((offset, reason) in done for offset in range(state.offset) for reason in REASONS)


@pytest.mark.parametrize("reason", [*get_args(Reason), "unknown_schema", "invalid_utf16", "http_503", "3d"])
def test_every_reason_is_remembered_also_those_of_later_versions(reason: str) -> None:
    state = Replayed(0)
    state.add(5, 10, [reason])
    state.add(20, 30, ["empty_text"])
    state = Replayed.read(0, state.metadata())
    assert state.has(7, reason)
    assert state.has(25, "empty_text")
    assert not state.has(7, "other")


def test_what_a_version_before_took_for_no_dead_letters_is_not_done() -> None:
    state = Replayed.read(3, "empty_text=5-9;invalid_utf8=5-9")
    assert state.has(6, "empty_text")
    assert not state.has(6, "invalid_utf8")


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
