"""Why the worker is not ready, and that each failure is logged once and its end once."""

import logging

import pytest

from worker.telemetry.health import Health


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def health(clock: Clock, caplog: pytest.LogCaptureFixture) -> Health:
    caplog.set_level(logging.DEBUG, "worker.telemetry.health")
    return Health(clock=clock)


def logged(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """The lines so far: level and message."""
    return [(record.levelname, record.getMessage()) for record in caplog.records]


def test_without_a_failure_it_is_ready_and_alive(health: Health) -> None:
    assert health.why_not_ready() is None
    assert health.why_not_alive() is None


def test_a_failure_is_logged_once_and_its_end_once(
    health: Health, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(5):
        health.failing("kafka", "no broker answers")
        clock.now += 2.0
    assert logged(caplog) == [("WARNING", "no broker answers")]
    assert vars(caplog.records[0])["part"] == "kafka"
    health.working("kafka")
    health.working("kafka")
    assert logged(caplog) == [("WARNING", "no broker answers"), ("INFO", "kafka: recovered after 10 s")]
    assert vars(caplog.records[1])["after_s"] == 10.0


def test_what_is_not_needed_any_more_keeps_nobody_from_being_ready_and_has_not_recovered(
    health: Health, caplog: pytest.LogCaptureFixture
) -> None:
    health.failing("registry", "no answer")
    for _ in range(2):
        health.not_needed("registry")
    assert health.why_not_ready() is None
    assert logged(caplog) == [("WARNING", "no answer")]


def test_each_reason_of_a_failure_is_logged_once_while_it_lasts(
    health: Health, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for reason in ("refused", "no answer", "refused", "no answer"):
        health.failing("kafka", reason)
        assert health.why_not_ready() == f"kafka: {reason}"
        clock.now += 1.0
    assert logged(caplog) == [("WARNING", "refused"), ("WARNING", "no answer")]
    health.working("kafka")
    assert logged(caplog)[2:] == [("INFO", "kafka: recovered after 4 s")]
    assert vars(caplog.records[2])["after_s"] == 4.0


def test_a_failure_that_comes_back_is_logged_again(health: Health, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        health.failing("kafka", "refused")
        health.working("kafka")
    assert [message for _, message in logged(caplog)] == ["refused", "kafka: recovered after 0 s"] * 2


def test_a_reason_is_a_reason_whatever_signs_it_has(health: Health, caplog: pytest.LogCaptureFixture) -> None:
    health.failing("kafka", "100 % of %s are gone")
    assert logged(caplog) == [("WARNING", "100 % of %s are gone")]


def test_what_is_wrong_is_kept_apart_from_what_begins_or_ends(health: Health) -> None:
    health.not_ready("model", "loading")
    assert not health.is_failing()
    health.failing("kafka", "no broker answers")
    assert health.is_failing()
    health.working("kafka")
    assert not health.is_failing()
    assert Health(lambda: "inference hangs").is_failing()


def test_being_not_ready_is_no_failure_and_not_logged(health: Health, caplog: pytest.LogCaptureFixture) -> None:
    health.not_ready("model", "loading")
    assert health.why_not_ready() == "model: loading"
    health.working("model")
    assert health.why_not_ready() is None
    assert logged(caplog) == []


def test_a_failure_of_what_was_not_ready_is_logged_and_so_is_its_end(
    health: Health, caplog: pytest.LogCaptureFixture
) -> None:
    health.not_ready("group", "not joined yet")
    health.failing("group", "no permission")
    assert health.why_not_ready() == "group: no permission"
    health.working("group")
    assert logged(caplog) == [("WARNING", "no permission"), ("INFO", "group: recovered after 0 s")]


def test_it_is_said_once_that_nothing_keeps_the_worker_from_being_ready() -> None:
    logged: list[str] = []
    health = Health(when_ready=lambda: logged.append("ready"))
    health.not_ready("model", "loading")
    health.not_ready("group", "not joined yet")
    health.failing("kafka", "away")
    health.working("model")
    health.not_needed("kafka")
    assert not logged
    for _ in range(2):
        health.working("group")
        health.failing("group", "rejoining")
    assert logged == ["ready"]


def test_each_part_works_by_itself(health: Health) -> None:
    health.failing("topics", "texts is missing")
    health.failing("kafka", "refused")
    assert health.why_not_ready() == "topics: texts is missing"
    health.working("topics")
    assert health.why_not_ready() == "kafka: refused"
    health.working("kafka")
    assert health.why_not_ready() is None


def test_a_part_that_was_never_failing_is_not_logged(health: Health, caplog: pytest.LogCaptureFixture) -> None:
    health.working("kafka")
    assert logged(caplog) == []


def test_dead_inference_is_neither_alive_nor_ready_and_kafka_plays_no_part() -> None:
    answers: list[str | None] = [None, None, "inference is hung", "inference is hung"]
    health = Health(why_not_alive=lambda: answers.pop(0))
    health.failing("kafka", "refused")
    assert health.why_not_alive() is None
    assert health.why_not_ready() == "kafka: refused"
    assert health.why_not_alive() == "inference is hung"
    assert health.why_not_ready() == "inference is hung"


def test_a_part_of_several_works_when_each_of_them_does(health: Health, caplog: pytest.LogCaptureFixture) -> None:
    for who in ("t-0", "t-1"):
        health.failing("publish", "stalled", who)
    health.working("publish", "t-0")
    health.working("publish", "t-2")
    assert health.why_not_ready() == "publish: stalled"
    health.working("publish", "t-1")
    assert health.why_not_ready() is None
    assert [message for _, message in logged(caplog)] == ["stalled", "publish: recovered after 0 s"], (
        "said once for all"
    )


def test_nobody_ends_the_failure_of_another(health: Health, caplog: pytest.LogCaptureFixture) -> None:
    health.failing("kafka", "no answer", "reader")
    health.failing("kafka", "refused", "lag")
    health.working("kafka")
    health.working("kafka", "lag")
    assert health.why_not_ready() == "kafka: no answer", "the reason is that of who still has one"
    health.working("kafka", "reader")
    assert health.why_not_ready() is None
    assert [message for _, message in logged(caplog)] == ["no answer", "refused", "kafka: recovered after 0 s"]


def test_a_failure_says_more_than_that_something_has_not_begun(health: Health) -> None:
    health.not_ready("group", "not joined yet")
    assert health.why_not_ready() == "group: not joined yet"
    health.failing("kafka", "no broker answers")
    assert health.why_not_ready() == "kafka: no broker answers"
    health.working("kafka")
    assert health.why_not_ready() == "group: not joined yet"
