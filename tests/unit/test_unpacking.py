"""Compressed batches come out as they went in, and bombs do not come out at all."""

import gzip
from typing import Any

import cramjam
import pytest
from aiokafka.record.default_records import (
    DefaultRecordBatch,
    DefaultRecordBatchBuilder,
    _DefaultRecordBatchBuilderPy,
    _DefaultRecordBatchPy,
)

import worker.cluster  # noqa: F401 - sets the bound
from worker import unpacking
from worker.source import UNREADABLE
from worker.unpacking import UnpacksTooLarge, unpack_gzip

GZIP, SNAPPY, LZ4, ZSTD = 1, 2, 3, 4
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


@pytest.mark.parametrize("codec", [GZIP, LZ4, ZSTD])
@pytest.mark.parametrize(("reader", "builder"), KINDS, ids=["compiled", "plain"])
def test_a_batch_that_would_fill_the_memory_is_unreadable(reader: Any, builder: Any, codec: int) -> None:
    assert issubclass(UnpacksTooLarge, UNREADABLE)
    assert values(reader, builder, codec, [bytes(2**20 - 1_000)])
    with pytest.raises(UnpacksTooLarge):
        values(reader, builder, codec, [bytes(2**20)])


def test_gzip_in_several_parts() -> None:
    parts = [gzip.compress(bytes(400_000)) for _ in range(3)]
    assert unpack_gzip(b"".join(parts[:2])) == bytes(800_000)
    with pytest.raises(UnpacksTooLarge):
        unpack_gzip(b"".join(parts))


@pytest.mark.parametrize("unpack", [unpack_gzip, unpacking.Unpacker(cramjam.lz4), unpacking.Unpacker(cramjam.zstd)])
def test_what_is_no_archive_is_unreadable(unpack: Any) -> None:
    for broken in (b"x", b"no archive at all", gzip.compress(b"text")[:-6], bytes(cramjam.zstd.compress(b"text"))[:-2]):
        with pytest.raises(UNREADABLE):
            unpack(broken)
