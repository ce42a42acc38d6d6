"""Batches of records byte by byte, as no producer makes them and brokers take them."""

import struct
from typing import Final

from aiokafka import AIOKafkaProducer
from aiokafka.record.util import calc_crc32c, encode_varint

NONE, GZIP, SNAPPY, LZ4, ZSTD = range(5)
HEAD: Final = struct.Struct(">hiqqqhii")  # attributes to record count, of which with the records the checksum is


def varint(number: int) -> bytes:
    written = bytearray()
    encode_varint(number, written.append)
    return bytes(written)


def record(offset: int, value: bytes, headers: bytes = b"", header_count: int = 0) -> bytes:
    """A record without a key."""
    rest = b"\0\0" + varint(offset) + varint(-1) + varint(len(value)) + value + varint(header_count) + headers
    return varint(len(rest)) + rest


def batch(packed: bytes, codec: int, count: int) -> bytes:
    """A batch of so many records, packed or not, whose first offset is 0."""
    body = HEAD.pack(codec, count - 1, 1_000, 1_000, -1, -1, -1, count) + packed
    return struct.pack(">qiibI", 0, len(body) + 9, -1, 2, calc_crc32c(body)) + body


class Built:
    """Stands where aiokafka builds a batch."""

    def __init__(self, built: bytes) -> None:
        self._built = built

    def build(self) -> bytes:
        return self._built

    def size(self) -> int:
        return len(self._built)


async def send(bootstrap: str, topic: str, batches: dict[int, bytes], count: int) -> None:
    """Publishes one batch of so many records for each of these partitions, as it is."""
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, enable_idempotence=False, request_timeout_ms=60_000)
    await producer.start()
    try:
        for partition, built in batches.items():
            under_way = producer.create_batch()
            under_way._builder, under_way._relative_offset = Built(built), count
            await (await producer.send_batch(under_way, topic, partition=partition))
    finally:
        await producer.stop()
