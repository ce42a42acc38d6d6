"""Where a run with an end stops in a partition, and how a commit's metadata says so."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.core.bounds import Bound, bound_in, ends_in
from worker.core.topic_ids import is_of, with_topic_id, without_topic_id

ID = "a" * 22


def records(*dated: tuple[int, int | None]) -> Any:
    return [SimpleNamespace(offset=offset, timestamp=timestamp) for offset, timestamp in dated]


@given(until_ms=st.integers(0, 10**15 - 1), offset=st.integers(0, 2**63 - 1), topic_id=st.sampled_from(["", ID]))
def test_metadata_say_the_bound_beside_the_topics_id(until_ms: int, offset: int, topic_id: str) -> None:
    bound = Bound(until_ms, offset)
    metadata = with_topic_id(topic_id, bound.metadata)
    assert bound_in(metadata) == bound
    assert without_topic_id(metadata)[0] == topic_id
    assert is_of(ID, metadata)
    assert len(metadata) < 100


@pytest.mark.parametrize(
    "metadata", ["", f"topic_id={ID}", "until=;end=", "until=1;end=x", "their own", "until=1;end=2;x=3"]
)
def test_other_metadata_name_no_bound(metadata: str) -> None:
    assert bound_in(metadata) is None
    assert ends_in([metadata]) == set()


def test_a_groups_commits_say_which_ends_it_has() -> None:
    assert ends_in(["", "until=7;end=1", "until=5;end=2", "until=7;end=3"]) == {5, 7}


def test_a_record_of_the_end_or_later_is_the_bound() -> None:
    some = records((3, 9), (5, None), (6, -1), (8, 10), (9, 1))
    assert Bound(10, 100).within(some) == (some[:3], Bound(10, 8))
    assert Bound(11, 100).within(some) == (some, Bound(11, 100))
    assert Bound(9, 100).within(some) == ([], Bound(9, 3))


def test_nothing_behind_the_bound_is_looked_at() -> None:
    some = records((3, 1), (6, 99), (8, 1))
    assert Bound(10, 5).within(some) == (some[:1], Bound(10, 5))
    assert Bound(10, 6).within(some) == (some[:1], Bound(10, 6))


def test_it_is_reached_at_the_offset_after_the_last_record() -> None:
    assert [Bound(0, 5).is_reached(offset) for offset in (None, 4, 5, 6)] == [False, False, True, True]
