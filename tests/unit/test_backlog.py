"""What is said of where a group will begin."""

import pytest

from worker.backlog import Backlog


@pytest.mark.parametrize(
    ("found", "said", "is_all_over_again"),
    [
        (
            Backlog("g", "earliest", 3, 1_234, 0, 0),
            "goes on from its committed offsets: 1,234 records in 3 partitions",
            False,
        ),
        (
            Backlog("g", "earliest", 0, 0, 2, 50),
            "has no committed offset: it begins at the earliest, 50 records in 2 partitions",
            True,
        ),
        (
            Backlog("g", "latest", 0, 0, 2, 50),
            "has no committed offset: it begins at the latest, 50 records in 2 partitions that are skipped",
            True,
        ),
        (
            Backlog("g", "earliest", 2, 7, 1, 0),
            "goes on from its committed offsets: 7 records in 2 partitions; it has no committed offset of 1 other "
            "partitions: it begins at the earliest, 0 records",
            False,
        ),
    ],
)
def test_where_it_begins_is_one_sentence(found: Backlog, said: str, is_all_over_again: bool) -> None:
    assert (str(found), found.is_all_over_again) == (f"group g {said}", is_all_over_again)
