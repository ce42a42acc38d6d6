"""When the share of dead letters is a flood, against a plain list of all records."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.core.dead_letter_limit import DeadLetterLimit, TooManyDeadLetters

REASONS = ("invalid_json", "empty_text", "inference_failed")
OUTCOMES = st.lists(st.sampled_from((None, None, *REASONS)), max_size=40)


def look(gauge: DeadLetterLimit, outcomes: list[str | None]) -> str:
    """What the gauge says of a micro-batch; nothing if it goes through."""
    try:
        gauge.look_at(len(outcomes), Counter(outcome for outcome in outcomes if outcome))  # type: ignore[arg-type]
    except TooManyDeadLetters as flood:
        return str(flood)
    return ""


@given(st.lists(OUTCOMES, max_size=30), st.floats(0.01, 1), st.integers(1, 60))
def test_it_is_a_flood_when_the_newest_whole_batches_say_so(
    batches: list[list[str | None]], limit: float, window: int
) -> None:
    gauge = DeadLetterLimit(limit=limit, window=window)
    for count in range(1, len(batches) + 1):
        newest: list[str | None] = []
        for batch in reversed(batches[:count]):  # whole batches, until there are enough records
            newest = batch + newest
            if len(newest) >= window:
                break
        failures = [outcome for outcome in newest if outcome]
        is_flood = len(newest) >= window and len(failures) >= limit * len(newest)
        sentence = look(gauge, batches[count - 1])
        assert bool(sentence) == is_flood
        if is_flood:
            assert f"{len(failures)} of the last {len(newest)} records" in sentence
            most = max(Counter(failures).values())
            assert any(f"({most}) for {reason}:" in sentence for reason in REASONS if failures.count(reason) == most)
            return


@given(st.lists(OUTCOMES, max_size=30))
def test_a_limit_of_0_is_none(batches: list[list[str | None]]) -> None:
    gauge = DeadLetterLimit(limit=0, window=1)
    assert not any(look(gauge, batch) for batch in batches)


def test_nothing_is_judged_before_there_are_enough_records() -> None:
    gauge = DeadLetterLimit(limit=0.5, window=1_000)
    assert not look(gauge, ["invalid_json"] * 999)
    assert look(gauge, [None])


@pytest.mark.parametrize(("failed", "is_flood"), [(499, False), (500, True)])
def test_the_limit_itself_is_a_flood(failed: int, is_flood: bool) -> None:
    outcomes = ["invalid_json"] * failed + [None] * (1_000 - failed)
    assert bool(look(DeadLetterLimit(limit=0.5, window=1_000), outcomes)) is is_flood


def test_what_is_past_is_forgotten() -> None:
    gauge = DeadLetterLimit(limit=0.5, window=1_000)
    assert not look(gauge, ["invalid_json"] * 900)
    assert not look(gauge, [None] * 1_000)
    assert not look(gauge, ["empty_text"] * 499 + [None] * 501)
    assert "1000 of the last 1000 records" in look(gauge, ["empty_text"] * 1_000)
