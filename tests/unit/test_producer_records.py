"""The bounds of records' sizes, and how many records a batch takes."""

import pytest
from aiokafka.producer.message_accumulator import BatchBuilder
from hypothesis import given
from hypothesis import strategies as st

from worker.core.events import Outgoing
from worker.kafka import producer_records as module
from worker.kafka.producer_records import Columns, ProducerRecord, filled, most_bytes, record_bytes

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
