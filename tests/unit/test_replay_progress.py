"""What has been replayed, against a plain set of offsets and reasons."""

import re
from itertools import pairwise
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.core.replay_progress import MAX_METADATA_BYTES, ProgressTooLarge, ReplayProgress, merge
from worker.reasons import Reason

REASONS = ("invalid_json", "invalid_utf8", "too_large")
SIZE = 40
RANGES = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE))
KEPT_BACK = st.sets(st.integers(0, SIZE), max_size=4)
REPLAYS = st.lists(st.tuples(RANGES, st.sets(st.sampled_from(REASONS)), KEPT_BACK), max_size=12)
EARLIER = re.compile(r"(?:[a-z_*]+=\d+-\d+(?:,\d+-\d+)*(?:;|$))*")


@given(REPLAYS, st.integers(0, SIZE))
def test_it_knows_what_has_been_replayed_also_after_a_commit(
    replays: list[tuple[tuple[int, int], set[str], set[int]]], begin: int
) -> None:
    progress = ReplayProgress(begin)
    done = {(offset, reason) for offset in range(begin) for reason in REASONS}
    for (start, end), reasons, unknown in replays:
        kept_back = {offset for offset in unknown if start <= offset < end}
        progress.add(start, end, reasons, kept_back)
        offsets = set(range(start, end)) - kept_back
        done |= {(offset, reason) for offset in offsets for reason in reasons or REASONS}
        assert EARLIER.fullmatch(progress.metadata()), "a version before can go on"
        progress = ReplayProgress.read(progress.offset, progress.metadata())
    for offset in range(SIZE + 1):
        for reason in REASONS:
            assert progress.has(offset, reason) == ((offset, reason) in done)
    assert all((offset, reason) in done for offset in range(progress.offset) for reason in REASONS)


@pytest.mark.parametrize("reason", [*get_args(Reason), "unknown_schema", "invalid_utf16", "http_503", "3d"])
def test_every_reason_is_remembered_also_those_of_later_versions(reason: str) -> None:
    progress = ReplayProgress(0)
    progress.add(5, 10, [reason])
    progress.add(20, 30, ["empty_text"])
    progress = ReplayProgress.read(0, progress.metadata())
    assert progress.has(7, reason)
    assert progress.has(25, "empty_text")
    assert not progress.has(7, "other")


def test_what_a_version_before_took_for_no_dead_letters_is_not_done() -> None:
    progress = ReplayProgress.read(3, "empty_text=5-9;invalid_utf8=5-9")
    assert progress.has(6, "empty_text")
    assert not progress.has(6, "invalid_utf8")


@given(st.lists(RANGES))
def test_merged_ranges_hold_the_same_offsets_and_never_touch(ranges: list[tuple[int, int]]) -> None:
    merged = merge(ranges)
    assert {o for begin, end in merged for o in range(begin, end)} == {
        o for begin, end in ranges for o in range(begin, end)
    }
    assert all(one[1] < other[0] for one, other in pairwise(merged))


def test_what_the_topic_has_lost_is_forgotten() -> None:
    progress = ReplayProgress(0)
    progress.add(5, 10, ["empty_text"])
    progress.forget_before(20)
    assert (progress.offset, progress.metadata()) == (20, "")


@pytest.mark.parametrize("metadata", ["", "of another tool", "empty_text=1-", "=", "a=1-2;;", "a=1-2,"])
def test_metadata_of_others_counts_as_none(metadata: str) -> None:
    assert not ReplayProgress.read(0, metadata).has(1, "a")


def test_progress_that_no_commit_holds_is_refused() -> None:
    progress = ReplayProgress(0)
    for begin in range(1, MAX_METADATA_BYTES, 2):
        progress.add(begin, begin + 1)
    with pytest.raises(ProgressTooLarge):
        progress.metadata()
