"""The limit of open files, and what partitions need."""

import pytest

from worker.runtime import file_descriptors as descriptors
from worker.runtime.file_descriptors import check_limit, files_needed, raise_limit

resource = pytest.importorskip("resource")


def test_it_is_raised_as_far_as_it_goes() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 200), hard))
    try:
        raise_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_exactly_once_needs_more_with_each_partition_and_at_least_once_does_not() -> None:
    """As counted beside one broker: 64 files with 24 partitions, 32 with 8; 17 with any number at least once."""
    assert files_needed(24, 1, exactly_once=True) - files_needed(8, 1, exactly_once=True) == 64 - 32
    assert files_needed(24, 1, exactly_once=False) == files_needed(8, 1, exactly_once=False) >= 17


@pytest.mark.parametrize(("limit", "is_enough"), [(300, False), (466, False), (467, True), (-1, True)])
def test_what_there_is_and_what_is_needed_are_compared(
    monkeypatch: pytest.MonkeyPatch, limit: int, is_enough: bool
) -> None:
    monkeypatch.setattr(descriptors.resource, "getrlimit", lambda _: (limit, limit))
    found, sentence = check_limit(200, 1, exactly_once=True)
    assert found is is_enough
    assert "200 partitions may need 467" in sentence


def test_where_there_is_no_such_limit_nothing_is_raised_or_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "resource", None)
    raise_limit()
    assert check_limit(10_000, 9, exactly_once=True)[0]
