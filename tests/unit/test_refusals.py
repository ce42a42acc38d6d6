"""When it is logged that a topic refuses results."""

import pytest

from worker.kafka.refusals import RefusalLog


@pytest.fixture
def now() -> list[float]:
    return [1_000.0]


def test_refusals_are_logged_at_their_beginning_and_at_their_end(
    now: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    refusals = RefusalLog("results", clock=lambda: now[0])
    refusals.note({})
    for _ in range(3):
        now[0] += 50
        refusals.note({"invalid_timestamp": 2})
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    now[0] += 50
    refusals.note({})
    now[0] += 50
    refusals.note({})
    refusals.note({})
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert vars(caplog.records[-1])["were"] == {"invalid_timestamp": 6}
