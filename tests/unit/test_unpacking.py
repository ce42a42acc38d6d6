"""Compressed batches come out as they went in, and bombs do not come out at all."""

import gzip
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

import worker.cluster  # noqa: F401 - sets the bound
from worker import unpacking
from worker.source import UNREADABLE
from worker.unpacking import UnpacksTooLarge

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
