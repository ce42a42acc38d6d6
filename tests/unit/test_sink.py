"""What is published: its bounds, how much of it a batch takes, and what is known of what a topic refuses."""

from types import SimpleNamespace

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import UnknownTopicOrPartitionError
from aiokafka.producer.message_accumulator import BatchBuilder
from hypothesis import given
from hypothesis import strategies as st

from worker.core.events import Outgoing
from worker.kafka import producer_records as module
from worker.kafka.output_limits import CLOCK_TOLERANCE_MS, REFUSAL_VALID_S, TimestampCheck
from worker.kafka.producer_records import Columns, ProducerRecord, filled, most_bytes, record_bytes
from worker.kafka.refusals import RefusalLog
from worker.kafka.sink import Sink
from worker.kafka.topics import TopicLimits

HOUR_MS = 3_600_000
BYTES = st.none() | st.binary(max_size=300)
HEADERS = st.lists(st.tuples(st.text(max_size=20), BYTES), max_size=4)


@given(st.lists(st.builds(Outgoing, BYTES, BYTES, HEADERS, st.just(0)), min_size=1))
def test_no_record_is_larger_than_the_bound_of_all(records: list[Outgoing]) -> None:
    keys, values, headers, _ = zip(*records, strict=True)
    assert most_bytes(keys, values, headers) >= max(map(record_bytes, keys, values, headers))


@pytest.mark.parametrize("bound", [0, 10**9])
def test_a_batch_says_how_many_it_took(bound: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the bound was wrong: what does not fit is left for the next batch."""
    monkeypatch.setattr(module, "most_bytes", lambda *_: bound)
    batch = BatchBuilder(1_000, 0)
    producer_records = [
        ProducerRecord("results", Outgoing(b"key", bytes(90), [], 1), 0, offset) for offset in range(50)
    ]
    taken = filled(batch, Columns.of(producer_records), list(range(50)), 1_000_000)
    assert taken == list(range(len(taken)))
    assert 0 < len(taken) < 50
    assert batch.record_count() == len(taken)


# Timestamps, by a clock that may be wrong.


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


# Partitions.


async def test_a_partition_that_is_gone_is_one_of_kafkas_errors() -> None:
    """aiokafka knows by its metadata, and has no more than an AssertionError for it."""

    async def send_batch(*_: object, **__: object) -> None:
        raise AssertionError("Unrecognized partition")

    batch, producer = BatchBuilder(1_000, 0), SimpleNamespace(send_batch=send_batch)
    with pytest.raises(UnknownTopicOrPartitionError):
        await Sink._enqueue(SimpleNamespace(), producer, batch, TopicPartition("results", 3))  # type: ignore[arg-type]
