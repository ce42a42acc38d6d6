"""Upper bounds of what is published."""

from hypothesis import given
from hypothesis import strategies as st

from worker.events import Outgoing
from worker.sink import most_bytes, record_bytes

BYTES = st.none() | st.binary(max_size=300)
HEADERS = st.lists(st.tuples(st.text(max_size=20), BYTES), max_size=4)


@given(st.lists(st.builds(Outgoing, BYTES, BYTES, HEADERS, st.just(0)), min_size=1))
def test_no_record_is_larger_than_the_bound_of_all(records: list[Outgoing]) -> None:
    assert most_bytes(records) >= max(map(record_bytes, records))
