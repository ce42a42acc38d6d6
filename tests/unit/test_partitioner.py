"""Partitions are those that Kafka's clients choose."""

import random

from aiokafka.partitioner import murmur2 as murmur2_of_aiokafka
from hypothesis import given
from hypothesis import strategies as st

from worker.core.partitioner import MAX_PADDED_BYTES, murmur2, partitions_for


@given(
    st.lists(
        st.binary(max_size=70) | st.binary(min_size=MAX_PADDED_BYTES - 2, max_size=MAX_PADDED_BYTES + 9), max_size=9
    )
)
def test_hashes_are_those_of_kafka(keys: list[bytes]) -> None:
    assert murmur2(keys).tolist() == [murmur2_of_aiokafka(key) & 0xFFFFFFFF for key in keys]


def test_every_length_beside_every_other() -> None:
    keys = [random.Random(length).randbytes(length) for length in range(MAX_PADDED_BYTES + 10)]
    assert murmur2(keys).tolist() == [murmur2_of_aiokafka(key) & 0xFFFFFFFF for key in keys]


def test_a_null_key_goes_by_its_input_partition_and_an_empty_one_by_its_hash() -> None:
    empty = (murmur2_of_aiokafka(b"") & 0x7FFFFFFF) % 5
    assert partitions_for([None, b"", None], [7, 7, 3], 5).tolist() == [2, empty, 3]
    assert partitions_for([], [], 5).tolist() == []
