"""What is known of the timestamps that a topic refuses, by a clock that may be wrong, and of sizes once compressed."""

import os

import pytest
from aiokafka.errors import MessageSizeTooLargeError

from worker.core.events import Outgoing
from worker.kafka.aiokafka_compat.producer import batch_bytes
from worker.kafka.connection import Connection
from worker.kafka.output_limits import CLOCK_TOLERANCE_MS, REFUSAL_VALID_S, OutputLimits, TimestampCheck
from worker.kafka.producer_records import Columns, ProducerRecord
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


# Sizes.


@pytest.mark.parametrize("codec", ["gzip", "snappy", "lz4", "zstd"])
def test_how_large_a_record_is_compressed_is_looked_at_once_the_topic_has_refused_one(codec: str) -> None:
    limits = OutputLimits(
        Connection(("nowhere:1",)),
        {"out": TopicLimits(max_message_bytes=20_000, is_known=True)},
        compression_type=codec,
    )
    values = [b"small", os.urandom(30_000), b"x" * 30_000]
    columns = Columns.of([ProducerRecord("out", Outgoing(None, value, [], 0), 0) for value in values])
    assert limits.refused(columns, [0, 1, 2]) == {}
    limits.learn(columns, "out", [1], MessageSizeTooLargeError())
    assert limits.refused(columns, [0, 1, 2]) == {1: "result_too_large"}


def test_where_nothing_is_compressed_the_size_is_known_before() -> None:
    limits = OutputLimits(
        Connection(("nowhere:1",)),
        {"out": TopicLimits(max_message_bytes=20_000, is_known=True)},
        compression_type=None,
    )
    columns = Columns.of([ProducerRecord("out", Outgoing(None, b"x" * size, [], 0), 0) for size in (10, 30_000)])
    assert limits.refused(columns, [0, 1]) == {1: "result_too_large"}


@pytest.mark.parametrize("codec", [None, "gzip"])
def test_a_size_that_was_refused_is_remembered_where_the_limit_is_not_known(
    codec: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each record beyond it is found by halving its batch. Smaller ones are sent: they may be taken."""
    now = [1_000.0]
    monkeypatch.setattr("worker.kafka.output_limits.time.monotonic", lambda: now[0])
    limits = OutputLimits(Connection(("nowhere:1",)), {"out": TopicLimits()}, compression_type=codec)
    sizes = (10, 29_000, 30_000, 31_000)
    columns = Columns.of([ProducerRecord("out", Outgoing(None, os.urandom(size), [], 0), 0) for size in sizes])
    all_of_them = [*range(len(sizes))]
    limits.learn(columns, "out", [0, 2], MessageSizeTooLargeError())
    assert limits.refused(columns, all_of_them) == {}, "which of the two is not known"
    limits.learn(columns, "out", [3], MessageSizeTooLargeError())
    assert limits.refused(columns, all_of_them) == {3: "result_too_large"}
    limits.learn(columns, "out", [2], MessageSizeTooLargeError())
    limits.learn(columns, "out", [3], MessageSizeTooLargeError())
    assert limits.refused(columns, all_of_them) == {2: "result_too_large", 3: "result_too_large"}
    assert limits.refused(Columns.of([ProducerRecord("other", Outgoing(None, b"x" * 40_000, [], 0), 0)]), [0]) == {}
    now[0] += REFUSAL_VALID_S + 1
    assert limits.refused(columns, all_of_them) == {}, "the limit may have been raised"
    limits.learn(columns, "out", [3], MessageSizeTooLargeError())
    assert limits.refused(columns, all_of_them) == {3: "result_too_large"}


def test_a_refused_size_is_forgotten_although_batches_of_several_go_on_being_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A batch is larger than its records: that it is refused does not say that one of them still is."""
    now = [1_000.0]
    monkeypatch.setattr("worker.kafka.output_limits.time.monotonic", lambda: now[0])
    limits = OutputLimits(Connection(("nowhere:1",)), {"out": TopicLimits()}, compression_type=None)
    columns = Columns.of([ProducerRecord("out", Outgoing(None, b"x" * 30_000, [], 0), 0) for _ in range(9)])
    limits.learn(columns, "out", [0], MessageSizeTooLargeError())
    for _ in range(3):
        now[0] += REFUSAL_VALID_S / 2
        limits.learn(columns, "out", [*range(1, 9)], MessageSizeTooLargeError())
    assert limits.refused(columns, [0, 1]) == {}, "the topic's limit may have been raised"


def test_a_topic_that_stores_uncompressed_is_not_taken_to_refuse_what_was_sent_in_few_bytes() -> None:
    """It refuses a long text for its uncompressed size, however few bytes were sent."""
    limits = OutputLimits(Connection(("nowhere:1",)), {"out": TopicLimits()}, compression_type="gzip")
    values = [b"x" * 30_000, os.urandom(1_000), b"x" * 40_000, os.urandom(40_000)]
    columns = Columns.of([ProducerRecord("out", Outgoing(None, value, [], 0), 0) for value in values])
    limits.learn(columns, "out", [0], MessageSizeTooLargeError())
    assert limits.refused(columns, [0, 1, 2, 3]) == dict.fromkeys((0, 2, 3), "result_too_large")


def test_a_record_that_just_fits_is_sent() -> None:
    """How large it is by its fields' lengths is an upper bound."""
    record = Outgoing(b"key", b"x" * 20_000, [("h", b"v")] * 5, 0)
    size = batch_bytes(None, 0, *record[:3])
    columns = Columns.of([ProducerRecord("out", record, 0)])
    assert columns.record_bytes(0) > size
    for limit, refused in ((size, {}), (size - 1, {0: "result_too_large"})):
        limits = OutputLimits(
            Connection(("nowhere:1",)),
            {"out": TopicLimits(max_message_bytes=limit, is_known=True)},
            compression_type=None,
        )
        assert limits.refused(columns, [0]) == refused
