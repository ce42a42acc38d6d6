"""Compressed batches come out as they went in, and bombs do not come out at all."""

import gzip
import itertools
import time
import tracemalloc
from typing import Any

import cramjam
import pytest
from aiokafka import codec as codecs
from aiokafka.record._crecords import default_records as compiled_default_records
from aiokafka.record.default_records import (
    DefaultRecordBatch,
    DefaultRecordBatchBuilder,
    _DefaultRecordBatchBuilderPy,
    _DefaultRecordBatchPy,
)
from aiokafka.record.legacy_records import LegacyRecordBatch, LegacyRecordBatchBuilder
from aiokafka.record.util import decode_varint_py
from hypothesis import given, settings
from hypothesis import strategies as st

import worker.kafka.connection  # noqa: F401 - sets the bound
from tests.support import batches
from worker.kafka import decompression as unpacking
from worker.kafka.decompression import (
    HEADERS,
    LEGACY_RECORDS,
    PARTS,
    NeedsMore,
    Room,
    TooManyHeaders,
    UnpacksTooLarge,
    refuse_endless,
    refuse_many_headers,
    unpack_gzip,
    unpack_into,
    unpack_snappy,
)
from worker.kafka.partition_reader import UNREADABLE

GZIP, SNAPPY, LZ4, ZSTD = 1, 2, 3, 4


@pytest.fixture(autouse=True)
def python_varints(monkeypatch: pytest.MonkeyPatch) -> None:
    """aiokafka's reader in Python runs only where its extension is missing. With the extension's varints, which check no
    bounds, it would read past the end of a batch.
    """
    monkeypatch.setattr(_DefaultRecordBatchPy._read_msg, "__defaults__", (decode_varint_py,))


KINDS = [(DefaultRecordBatch, DefaultRecordBatchBuilder), (_DefaultRecordBatchPy, _DefaultRecordBatchBuilderPy)]


@pytest.fixture(autouse=True)
def bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "UNPACKED_BYTES", 2**20)


def values(reader: Any, builder: Any, codec: int, sent: list[bytes]) -> list[bytes]:
    """What a consumer reads of a batch with these values."""
    batch = builder(2, codec, 0, -1, -1, 0, 10**9)
    for offset, value in enumerate(sent):
        batch.append(offset, 0, None, value, [])
    return [record.value for record in reader(bytes(batch.build()))]


@pytest.mark.parametrize("codec", [GZIP, SNAPPY, LZ4, ZSTD])
@pytest.mark.parametrize(("reader", "builder"), KINDS, ids=["compiled", "plain"])
def test_batches_come_out_as_they_went_in(reader: Any, builder: Any, codec: int) -> None:
    sent = [b"", b"x", "хорошо".encode() * 1_000, bytes(range(256)) * 100, bytes(500_000)]
    assert values(reader, builder, codec, sent) == sent


@pytest.mark.parametrize("codec", [GZIP, SNAPPY, LZ4, ZSTD])
@pytest.mark.parametrize(("reader", "builder"), KINDS, ids=["compiled", "plain"])
def test_a_batch_that_would_fill_the_memory_is_unreadable(reader: Any, builder: Any, codec: int) -> None:
    assert issubclass(UnpacksTooLarge, UNREADABLE)
    assert values(reader, builder, codec, [bytes(2**20 - 1_000)])
    with pytest.raises(UnpacksTooLarge):
        values(reader, builder, codec, [bytes(2**20)])


@pytest.mark.parametrize("codec", ["gzip", "snappy", "lz4", "zstd"])
def test_what_is_no_archive_is_unreadable(codec: str) -> None:
    unpack = getattr(compiled_default_records, f"{codec}_decode")
    xerial = codecs.snappy_encode(b"text")
    parts = gzip.compress(b"text")[:-6], bytes(cramjam.zstd.compress(b"text"))[:-2], xerial[:-1], xerial + b"\0"
    for broken in (b"", b"x", b"no archive at all", b"\xff\xff\xff\xff\x0f\0a", *parts):
        with pytest.raises(UNREADABLE):
            unpack(broken)


members = st.lists(st.binary(max_size=300), min_size=1, max_size=30)


@given(members, st.integers(0, 9))
def test_gzip_of_many_members_is_what_gzip_makes_of_it(parts: list[bytes], level: int) -> None:
    packed = b"".join(gzip.compress(part * 50, level) for part in parts)
    assert unpack(packed) == gzip.decompress(packed) == b"".join(part * 50 for part in parts)


@given(members, st.data())
def test_gzip_that_is_cut_off_is_unreadable(parts: list[bytes], data: st.DataObject) -> None:
    """Unless it is cut between two members: nobody can tell."""
    packed = [gzip.compress(part) for part in parts]
    ends = set(itertools.accumulate(map(len, packed)))
    cut = data.draw(st.integers(0, len(b"".join(packed)) - 1).filter(lambda place: place not in ends))
    with pytest.raises(ValueError, match="ends too early"):
        unpack(b"".join(packed)[:cut])


def test_gzip_in_several_parts_keeps_the_bound() -> None:
    parts = [gzip.compress(bytes(400_000)) for _ in range(3)]
    assert unpack(b"".join(parts[:2])) == bytes(800_000)
    with pytest.raises(UnpacksTooLarge):
        unpack(b"".join(parts))


def test_many_members_cost_what_their_bytes_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a copy of what is there for each of them these would take a minute."""
    monkeypatch.setattr(unpacking, "UNPACKED_BYTES", 128 * 2**20)
    packed = gzip.compress(bytes(25_000)) * PARTS
    began = time.process_time()
    assert len(unpack(packed)) == 25_000 * PARTS
    assert time.process_time() - began < 5
    with pytest.raises(ValueError, match="too many members"):
        unpack(packed + gzip.compress(b""))


def unpack(packed: bytes) -> bytes:
    return bytes(unpack_gzip(packed, Room(unpacking.UNPACKED_BYTES)))


def test_blocks_of_snappy_are_bounded() -> None:
    head = codecs.snappy_encode(b"")[:16]
    block = codecs.snappy_encode(b"abc")[16:]
    assert unpack_snappy(head + block * PARTS, Room(2**20)) == b"abc" * PARTS
    with pytest.raises(ValueError, match="too many blocks"):
        unpack_snappy(head + block * (PARTS + 1), Room(2**20))
    with pytest.raises(NeedsMore):
        unpack_snappy(head + block * PARTS, Room(3 * PARTS - 1))


@pytest.mark.parametrize("codec", [cramjam.lz4, cramjam.zstd])
def test_many_frames_cost_little(codec: Any) -> None:
    for frame in (codec.compress(b""), b"\x50\x2a\x4d\x18\0\0\0\0"):  # an empty one, and one that is to be skipped
        began = time.process_time()
        unpack_into(codec, bytes(frame) * 100_000, Room(2**20, 2**20))
        assert time.process_time() - began < 2


# Headers.

HEADER = b"\0\1"  # without a name and a value


@pytest.mark.parametrize("records", [b"\xff" * 5, b"\x80\x80\x04" + b"\xff" * 9, b"\x80\x80\x04\0\0\0" + b"\xfe" * 4])
def test_lengths_that_lead_beyond_the_end_are_refused(records: bytes) -> None:
    """aiokafka's compiled reader of numbers would go on reading there."""
    data = bytearray(records)
    with pytest.raises(ValueError, match=r"length|range"):
        refuse_many_headers(data)
    assert data == records


def test_headers_are_bounded_before_they_are_made() -> None:
    many = batches.record(0, b"", HEADER * 5_000_000, 5_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(TooManyHeaders):
            refuse_many_headers(bytearray(many))
        assert tracemalloc.get_traced_memory()[1] < 3 * len(many)
    finally:
        tracemalloc.stop()


@given(st.lists(st.tuples(st.binary(max_size=20), st.integers(0, 3)), max_size=20), st.integers(0, 20))
@settings(max_examples=30)
def test_the_walk_finds_the_one_record_of_too_many_headers(others: list[tuple[bytes, int]], place: int) -> None:
    records = [batches.record(0, value, HEADER * count, count) for value, count in others]
    refuse_many_headers(bytearray(b"".join(records)))
    fitting = batches.record(0, bytes(3 * HEADERS), HEADER * HEADERS, HEADERS)
    records.insert(place, fitting)
    refuse_many_headers(bytearray(b"".join(records)))
    records.insert(place, batches.record(0, b"", HEADER * (HEADERS + 1), HEADERS + 1))
    with pytest.raises(TooManyHeaders):
        refuse_many_headers(bytearray(b"".join(records)))


@pytest.mark.parametrize("count", [-1, 0, 1, 3, 2**31 - 1])
def test_a_record_count_that_is_wrong_is_unreadable(count: int) -> None:
    records = batches.record(0, b"one") + batches.record(1, b"two")
    wrong = batches.batch(records, batches.NONE, count)
    for reader in (DefaultRecordBatch, _DefaultRecordBatchPy):
        with pytest.raises(UNREADABLE):
            list(reader(wrong))


# The formats before 0.11.


@pytest.mark.parametrize("length", [-(2**31), -13, -12, -1, 0, 13, 24, 2**31 - 1])
@pytest.mark.parametrize("magic", [0, 1])
def test_an_old_batch_without_an_end_is_unreadable(magic: int, length: int) -> None:
    """aiokafka would go around in it for ever."""
    builder = LegacyRecordBatchBuilder(magic, 0, 1_000)
    builder.append(0, 0, None, b"v" if magic else b"123456789", None)
    inner = bytearray(builder.build())
    assert len(inner) == 12 + 23
    assert [record.offset for record in LegacyRecordBatch(old_batch(bytes(inner) * 2, magic), magic)]
    inner[8:12] = length.to_bytes(4, "big", signed=True)
    with pytest.raises(UNREADABLE):
        list(LegacyRecordBatch(old_batch(bytes(inner) * 2, magic), magic))


def old_batch(inner: bytes, magic: int) -> bytes:
    builder = LegacyRecordBatchBuilder(magic, 0, len(inner))
    builder.append(0, 0, None, gzip.compress(inner), None)
    outer = bytearray(builder.build())
    outer[17] |= GZIP
    return bytes(outer)


def test_an_old_batch_of_too_many_records_is_unreadable() -> None:
    least = bytes(8) + (14).to_bytes(4, "big") + bytes(14)
    refuse_endless(bytearray(least * LEGACY_RECORDS))
    with pytest.raises(ValueError, match="too many records"):
        refuse_endless(bytearray(least * (LEGACY_RECORDS + 1)))
