"""The limit of open files, and what partitions need."""

import pytest

from worker.runtime import file_descriptors as descriptors
from worker.runtime.file_descriptors import check_limit, raise_limit

resource = pytest.importorskip("resource")


def test_it_is_raised_as_far_as_it_goes() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 200), hard))
    try:
        raise_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(("limit", "is_enough"), [(60, False), (81, False), (82, True), (-1, True)])
def test_what_there_is_and_what_is_needed_are_compared(
    monkeypatch: pytest.MonkeyPatch, limit: int, is_enough: bool
) -> None:
    monkeypatch.setattr(descriptors.resource, "getrlimit", lambda _: (limit, limit))
    found, sentence = check_limit(3)
    assert found is is_enough
    assert "a worker may need 82 beside 3 brokers" in sentence


def test_where_there_is_no_such_limit_nothing_is_raised_or_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "resource", None)
    raise_limit()
    assert check_limit(10_000)[0]
