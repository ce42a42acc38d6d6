"""When the share of dead letters reaches the limit, against a plain list of all records."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.core.dead_letter_limit import DeadLetterLimit, TooManyDeadLetters

REASONS = ("invalid_json", "empty_text", "inference_failed")
OUTCOMES = st.lists(st.sampled_from((None, None, *REASONS)), max_size=40)


def message_after(dead_letters: DeadLetterLimit, outcomes: list[str | None]) -> str:
    """What is raised for one more micro-batch; nothing if it goes through."""
    try:
        dead_letters.observe(len(outcomes), Counter(outcome for outcome in outcomes if outcome))  # type: ignore[arg-type]
    except TooManyDeadLetters as error:
        return str(error)
    return ""


@given(st.lists(OUTCOMES, max_size=30), st.floats(0.01, 1), st.integers(1, 60))
def test_the_limit_is_reached_when_the_newest_whole_batches_say_so(
    batches: list[list[str | None]], limit: float, window: int
) -> None:
    dead_letters = DeadLetterLimit(limit=limit, window=window)
    for count in range(1, len(batches) + 1):
        newest: list[str | None] = []
        for batch in reversed(batches[:count]):  # whole batches, until there are enough records
            newest = batch + newest
            if len(newest) >= window:
                break
        failures = [outcome for outcome in newest if outcome]
        is_reached = len(newest) >= window and len(failures) >= limit * len(newest)
        message = message_after(dead_letters, batches[count - 1])
        assert bool(message) == is_reached
        if is_reached:
            assert f"{len(failures)} of the last {len(newest)} records" in message
            most = max(Counter(failures).values())
            assert any(f"({most}) for {reason}:" in message for reason in REASONS if failures.count(reason) == most)
            return


@given(st.lists(OUTCOMES, max_size=30))
def test_a_limit_of_0_is_none(batches: list[list[str | None]]) -> None:
    dead_letters = DeadLetterLimit(limit=0, window=1)
    assert not any(message_after(dead_letters, batch) for batch in batches)


def test_nothing_is_raised_before_there_are_enough_records() -> None:
    dead_letters = DeadLetterLimit(limit=0.5, window=1_000)
    assert not message_after(dead_letters, ["invalid_json"] * 999)
    assert message_after(dead_letters, [None])


@pytest.mark.parametrize(("failed", "is_reached"), [(499, False), (500, True)])
def test_the_share_may_not_be_the_limit_itself(failed: int, is_reached: bool) -> None:
    outcomes = ["invalid_json"] * failed + [None] * (1_000 - failed)
    assert bool(message_after(DeadLetterLimit(limit=0.5, window=1_000), outcomes)) is is_reached


def test_older_batches_are_forgotten() -> None:
    dead_letters = DeadLetterLimit(limit=0.5, window=1_000)
    assert not message_after(dead_letters, ["invalid_json"] * 900)
    assert not message_after(dead_letters, [None] * 1_000)
    assert not message_after(dead_letters, ["empty_text"] * 499 + [None] * 501)
    assert "1000 of the last 1000 records" in message_after(dead_letters, ["empty_text"] * 1_000)
