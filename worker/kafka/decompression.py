"""Unpacks compressed batches within bounds: 33 kB of zstd can become a gigabyte, and aiokafka sets no limit.

``aiokafka_compat.fetching`` puts DECODERS and LEGACY_DECODERS in place of aiokafka's own.
"""

import asyncio
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any, Final, Protocol

import cramjam
from aiokafka.record.util import decode_varint

UNPACKED_BYTES: Final = 128 * 2**20  # of one batch; producers make them of a megabyte or so
AT_ONCE: Final = 2**20  # what unpacks to more is unpacked off the event loop
USUAL_RATIO: Final = 8
GROWTH: Final = 8
GZIP: Final = 31  # zlib's number for gzip's own header
PIECE: Final = 16_384
PARTS: Final = 5_000  # members of gzip, or blocks of snappy, which are of 32 KiB; producers make one member
HEADERS: Final = 10_000  # of one record
LONGEST_VARINT: Final = 10  # bytes
LEGACY_RECORDS: Final = 100_000  # of one batch in the formats before 0.11, whose records' heads are all read at once
XERIAL: Final = struct.pack("!b7sii", -126, b"SNAPPY\0", 1, 1)  # how snappy in blocks begins
LEGACY_LEAST: Final = 14  # bytes of the smallest record in those formats, after its offset and length


class UnpacksTooLarge(ValueError):
    """A batch is larger than UNPACKED_BYTES when it is unpacked."""


class TooManyHeaders(ValueError):
    """A record has more than HEADERS headers."""


class NeedsMore(Exception):
    """A batch unpacks to more than it was given room for."""


@dataclass(slots=True)
class Room:
    """How many bytes one batch may unpack to (``most``).

    ``least``: it is known to need more than that. ``held``: it took so many, once it is unpacked.
    """

    most: int
    least: int = 0
    held: int = 0

    def check(self, size: int) -> None:
        """Raises UnpacksTooLarge or NeedsMore where ``size`` is too much."""
        if size > self.most:
            raise UnpacksTooLarge if self.most >= UNPACKED_BYTES else NeedsMore


Unpack = Callable[[bytes, Room], bytearray]
_room: ContextVar[Room | None] = ContextVar("room", default=None)


class Codec(Protocol):
    """One of cramjam's codecs."""

    def decompress_into(self, packed: bytes, unpacked: bytearray) -> int: ...


def unpack_gzip(packed: bytes, room: Room) -> bytearray:
    """The bytes unpacked. Raises UnpacksTooLarge, NeedsMore, and ValueError where they are not gzip or of too many members.

    zlib copies the rest of its input at each member's end, so it gets the input in small pieces.
    """
    unpacked, position = bytearray(), 0
    for _ in range(PARTS):
        member = zlib.decompressobj(GZIP)
        while not member.eof:
            piece = packed[position : position + PIECE]
            try:
                some = member.decompress(piece, min(AT_ONCE, room.most - len(unpacked) + 1))
            except zlib.error as error:
                raise ValueError(str(error)) from None
            if not some and not piece:
                raise ValueError("it ends too early")
            unpacked += some
            room.check(len(unpacked))
            position += len(piece) - len(member.unconsumed_tail) - len(member.unused_data)
        if position == len(packed):
            return unpacked
    raise ValueError("it has too many members")


def unpack_snappy(packed: bytes, room: Room) -> bytearray:
    """Raises as ``unpack_gzip``; ValueError also where the bytes have too many blocks."""
    unpacked = bytearray()
    try:
        blocks = list(_xerial_blocks(packed)) if len(packed) > 16 and packed[:16] == XERIAL else [packed]
        room.check(sum(map(cramjam.snappy.decompress_raw_len, blocks)))
        for block in blocks:
            unpacked += cramjam.snappy.decompress_raw(block)
    except (cramjam.DecompressionError, struct.error) as error:
        raise ValueError(str(error)) from None
    return unpacked


def _xerial_blocks(packed: bytes) -> Iterator[bytes]:
    position = 16
    for _ in range(PARTS):
        (size,) = struct.unpack_from("!I", packed, position)
        yield packed[position + 4 : position + 4 + size]
        position += 4 + size
        if position >= len(packed):
            return
    raise ValueError("it has too many blocks")


def unpack_into(codec: Codec, packed: bytes, room: Room) -> bytearray:
    """The bytes unpacked, into a buffer that grows until all of it fits or the room is used up.

    Raises UnpacksTooLarge or NeedsMore, also where the bytes are damaged: cramjam does not tell the two apart.
    """
    size = max(room.least, USUAL_RATIO * len(packed) + 1_024)
    while True:
        unpacked = bytearray(min(size, room.most))
        try:
            length = codec.decompress_into(packed, unpacked)
        except cramjam.DecompressionError:
            room.check(size + 1)
            size *= GROWTH
        else:
            del unpacked[length:]
            return unpacked


def refuse_many_headers(records: bytearray) -> None:
    """Raises TooManyHeaders for the records of a batch that aiokafka has not parsed yet: it makes an object of each header.

    Skips from record to record by their lengths, and looks only into those long enough for so many headers. Raises
    ValueError if a length leads beyond the end.
    """
    position, end = 0, len(records)
    records += bytes(LONGEST_VARINT)  # aiokafka's compiled decode_varint does not look where the bytes end
    try:
        while position < end:
            length, position = decode_varint(records, position)
            if length > 2 * HEADERS and _headers(records, position, end) > HEADERS:
                raise TooManyHeaders
            position += max(0, length)
    finally:
        del records[end:]
    if position > end:
        raise ValueError("a record's length is wrong")


def _headers(records: bytearray, position: int, end: int) -> int:
    number, position = 0, position + 1  # attributes
    for name in ("timestamp", "offset", "key", "value", "headers"):
        if position >= end:
            raise ValueError("a record's length is wrong")
        number, position = decode_varint(records, position)
        if name in ("key", "value"):
            position += max(0, number)
    return number


def _refuse_in_large(records: bytearray) -> None:
    """Checks large batches only: headers of smaller ones are few enough to be counted after parsing."""
    if len(records) > AT_ONCE:
        refuse_many_headers(records)


def refuse_endless(records: bytearray) -> None:
    """Raises ValueError for records in old formats that aiokafka would read without end, or that are too many at once."""
    position = 0
    for _ in range(LEGACY_RECORDS):
        (length,) = struct.unpack_from("!i", records, position + 8)
        position += 12 + length
        if length < LEGACY_LEAST or position > len(records):
            raise ValueError("a record's length is wrong")
        if position == len(records):
            return
    raise ValueError("it has too many records")


def _decoder(unpack: Unpack, check: Callable[[bytearray], None]) -> Callable[[bytes], bytearray]:
    def decode(packed: bytes) -> bytearray:
        room = _room.get() or Room(UNPACKED_BYTES)
        unpacked = unpack(packed, room)
        room.held = min(sys.getsizeof(unpacked), room.most)
        check(unpacked)
        return unpacked

    return decode


def _decoders(check: Callable[[bytearray], None]) -> dict[str, Callable[[bytes], bytearray]]:
    """Decoders by the names of those that they replace; each gives the records it has unpacked to ``check``."""
    return {
        "gzip_decode": _decoder(unpack_gzip, check),
        "snappy_decode": _decoder(unpack_snappy, check),
        "lz4_decode": _decoder(partial(unpack_into, cramjam.lz4), check),
    }


DECODERS: Final = _decoders(_refuse_in_large) | {
    "zstd_decode": _decoder(partial(unpack_into, cramjam.zstd), _refuse_in_large)
}
LEGACY_DECODERS: Final = _decoders(refuse_endless)


def unpack_batch(batch: Any, room: Room) -> Iterator[Any] | None:
    """The records of a batch, unpacked; None if they need more room. Blocks. Raises what reading a record raises."""
    token = _room.set(room)
    try:
        records = chain(batch)
        first = list(islice(records, 1))  # a batch unpacks when its first record is asked for
        return chain(first, records)
    except NeedsMore:
        return None
    finally:
        _room.reset(token)


class Reservation:
    """Bytes taken from a budget until this object is deleted. Only the event loop's thread may use it."""

    def __init__(self, budget: "Budget", size: int) -> None:
        self._budget = budget
        self.size = size
        budget.free -= size

    def shrink(self, size: int) -> None:
        """Gives all but ``size`` bytes back to the budget."""
        self._budget.free += self.size - size
        self.size = size
        self._budget.freed.set()

    def __del__(self) -> None:
        self.shrink(0)


class Budget:
    """Bounds the bytes of unpacked batches that this process holds, without the records already taken from them.

    It cannot deadlock: a reader that waits for bytes holds none, not even those of a failed attempt; a reader that holds
    bytes waits only for the pipeline, which takes none; and no batch needs more than the whole budget.
    """

    def __init__(self, size: int) -> None:
        self.free = max(size, UNPACKED_BYTES)
        self.freed = asyncio.Event()
        self._turn = asyncio.Lock()  # one at a time, in the order of asking, so that a large batch has its turn, too

    def unpack_at_once(self, batch: Any) -> tuple[Iterator[Any], Reservation] | None:
        """The records of a small batch, if no reader waits; None where ``unpack`` has to be awaited. Raises as that does."""
        if self.free < AT_ONCE or self._turn.locked():
            return None
        reservation, room = Reservation(self, AT_ONCE), Room(AT_ONCE)
        records = None
        try:
            records = unpack_batch(batch, room)
        finally:
            reservation.shrink(0 if records is None else room.held)
        return None if records is None else (records, reservation)

    async def unpack(self, batch: Any) -> tuple[Iterator[Any], Reservation]:
        """The records of a batch, unpacked on a thread once there is room. Raises what reading a record raises."""
        size = AT_ONCE // GROWTH
        async with self._turn:
            while True:
                least, size = size, min(GROWTH * size, UNPACKED_BYTES)
                reservation, room = await self._reserve(size), Room(size, least)
                records = await self._on_thread(batch, room, reservation)
                if records is not None:
                    return records, reservation

    async def _reserve(self, size: int) -> Reservation:
        while self.free < size:
            self.freed.clear()
            await self.freed.wait()
        return Reservation(self, size)

    async def _on_thread(self, batch: Any, room: Room, reservation: Reservation) -> Iterator[Any] | None:
        """As ``unpack_batch``, on a thread. Shrinks the reservation to what the batch took."""
        # explicitly, because an exception's traceback would keep the reservation alive
        work = asyncio.create_task(asyncio.to_thread(unpack_batch, batch, room))
        records = None
        try:
            records = await asyncio.shield(work)
        finally:
            if work.done():
                reservation.shrink(0 if records is None else room.held)
            else:  # cancelled; the thread goes on, and holds the bytes until it is done
                work.add_done_callback(lambda _: reservation.shrink(0))
            del work  # it holds the exception, which holds this frame
        return records
