"""Compressed batches, unpacked up to a bound: 33 kB of zstd can become a gigabyte, and aiokafka takes it all."""

import zlib
from typing import Final, NamedTuple, Protocol

import cramjam
from aiokafka.record import default_records, legacy_records
from aiokafka.record._crecords import default_records as compiled_default_records
from aiokafka.record._crecords import legacy_records as compiled_legacy_records

UNPACKED_BYTES: Final = 128 * 2**20  # of one batch; producers make them of a megabyte or so
USUAL_RATIO: Final = 8
GZIP: Final = 31  # zlib's number for gzip's own header


class UnpacksTooLarge(ValueError):
    """A batch is larger than UNPACKED_BYTES when it is unpacked."""


class Codec(Protocol):
    """One of cramjam's."""

    def decompress_into(self, packed: bytes, unpacked: bytearray) -> int: ...


def unpack_gzip(packed: bytes) -> bytes:
    """Raises UnpacksTooLarge, and ValueError where the bytes are no such archive."""
    unpacked = b""
    while packed:
        member = zlib.decompressobj(GZIP)
        try:
            unpacked += member.decompress(packed, UNPACKED_BYTES - len(unpacked) + 1)
        except zlib.error as error:
            raise ValueError(str(error)) from None
        if len(unpacked) > UNPACKED_BYTES:
            raise UnpacksTooLarge
        if not member.eof:
            raise ValueError("it ends too early")
        packed = member.unused_data
    return unpacked


class Unpacker(NamedTuple):
    """Unpacks into a buffer that grows until all of it fits, or until it would be too large."""

    codec: Codec

    def __call__(self, packed: bytes) -> bytes:
        """Raises UnpacksTooLarge, also where the bytes are no such archive: cramjam does not tell the two apart."""
        size = USUAL_RATIO * len(packed) + 1_024
        while True:
            unpacked = bytearray(min(size, UNPACKED_BYTES))
            try:
                length = self.codec.decompress_into(packed, unpacked)
            except cramjam.DecompressionError:
                if size >= UNPACKED_BYTES:
                    raise UnpacksTooLarge from None
                size *= 8
            else:
                return bytes(memoryview(unpacked)[:length])


def bound_unpacking() -> None:
    """From now on every consumer of this process unpacks so. Snappy needs none: it packs to a twentieth at best."""
    for module in (default_records, legacy_records, compiled_default_records, compiled_legacy_records):
        module.gzip_decode = unpack_gzip
        module.lz4_decode = Unpacker(cramjam.lz4)
        module.zstd_decode = Unpacker(cramjam.zstd)
