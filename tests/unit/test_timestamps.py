"""Times as results have them, and ages that cannot be right."""

import pytest

from tests.support.events import AFTER_YEAR_9999, TEN
from worker.core.timestamps import age_s, iso_time


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [
        (0, "1970-01-01T00:00:00.000Z"),
        (1_795_428_000_021, "2026-11-23T10:00:00.021Z"),
        (1_795_428_000_021.9, "2026-11-23T10:00:00.021Z"),
        (AFTER_YEAR_9999 - 1, "9999-12-31T23:59:59.999Z"),
    ],
)
def test_times_have_milliseconds_in_utc(milliseconds: float, text: str) -> None:
    assert iso_time(milliseconds) == text


NOW_S = TEN / 1000
YEAR_S = 365 * 86_400


@pytest.mark.parametrize(
    ("timestamp", "age"),
    [
        (TEN, 0.0), (TEN - 1_500, 1.5), (TEN + 900, 0.0), (TEN - 1000 * YEAR_S, YEAR_S),
        (TEN - 1000 * YEAR_S - 1, None), (TEN // 1000, None), (TEN * 1000, None), (TEN + 1_001, None), (0, None),
        (-1, None), (None, None),
    ],
)  # fmt: skip
def test_a_timestamp_that_cannot_be_right_has_no_age(timestamp: int | None, age: float | None) -> None:
    assert age_s(timestamp, NOW_S) == age
