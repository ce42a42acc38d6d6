"""What is known of the timestamps that a topic refuses, by a clock that may be wrong."""

import pytest

from worker.kafka.output_limits import CLOCK_TOLERANCE_MS, REFUSAL_VALID_S, TimestampCheck
from worker.kafka.topics import TopicLimits

HOUR_MS = 3_600_000


@pytest.fixture
def now() -> list[float]:
    return [1_000.0]


@pytest.fixture
def check(now: list[float]) -> TimestampCheck:
    return TimestampCheck(clock=lambda: now[0])


def test_at_first_nothing_is_refused_without_the_broker(check: TimestampCheck) -> None:
    assert (check.refuses(), check.accepted_ms) == (False, 0)


def test_after_a_refusal_this_machines_clock_judges_for_a_minute(check: TimestampCheck, now: list[float]) -> None:
    check.learn(5_000, is_refused=True)
    assert check.refuses()
    now[0] += REFUSAL_VALID_S
    assert not check.refuses()


def test_what_the_broker_takes_is_in_doubt_no_more_and_others_of_that_clock_neither(check: TimestampCheck) -> None:
    check.learn(HOUR_MS, is_refused=False)
    assert check.accepted_ms == HOUR_MS + CLOCK_TOLERANCE_MS
    check.learn(HOUR_MS - 5_000, is_refused=False)
    assert check.accepted_ms == HOUR_MS + CLOCK_TOLERANCE_MS


def test_a_clock_that_is_wrong_beside_a_producer_whose_clock_is_worse(check: TimestampCheck) -> None:
    """The good records go on, whichever was sent first."""
    check.learn(9 * HOUR_MS, is_refused=True)
    check.learn(HOUR_MS, is_refused=False)
    assert check.refuses(), "beyond what was taken"
    assert check.accepted_ms == HOUR_MS + CLOCK_TOLERANCE_MS


def test_a_clock_that_is_set_right_is_in_doubt_anew(check: TimestampCheck) -> None:
    check.learn(2 * HOUR_MS, is_refused=False)
    check.learn(HOUR_MS, is_refused=True)
    assert (check.accepted_ms, check.refuses()) == (0, False)


def test_a_fast_clock_costs_a_refusal_or_two_a_minute(check: TimestampCheck, now: list[float]) -> None:
    """What it finds within the limits is refused, and its like is in doubt; what is within by far goes on."""
    check.learn(-HOUR_MS, is_refused=True)
    assert -3 * HOUR_MS < check.accepted_ms < -HOUR_MS
    check.learn(-HOUR_MS - 5, is_refused=True)
    assert check.refuses()
    now[0] += REFUSAL_VALID_S
    check.learn(-HOUR_MS, is_refused=False)
    assert check.accepted_ms > -HOUR_MS, "the clock was set"


def test_with_two_limits_a_fast_clock_does_not_tell_which_one_it_was(check: TimestampCheck) -> None:
    check.learn(-HOUR_MS, is_refused=True, is_one_sided=False)
    assert check.accepted_ms == 0
    assert not TopicLimits(timestamp_before_max_ms=HOUR_MS).is_one_sided
    assert TopicLimits().is_one_sided
