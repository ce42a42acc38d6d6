"""A strict reader of the zip archives that ``torch.save`` writes since torch 1.6. Needs no torch.

An archive has one folder. In it, ``data.pkl`` says which tensors there are (see ``torch_pickle``), and ``data/<key>`` holds
their numbers, neither compressed nor encrypted. What torch.save would not write is refused. A record's CRC-32 is not
checked: torch.save can leave it out, and torch does not look at it either.
"""

import io
import struct
import zipfile
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from worker.model.torch_pickle import Storage, TensorView, parse_state_dict
from worker.model.weight_arrays import ITEM_BYTES, Array, Damaged, OnlyForTorch, UnusableFile, read_array

MAX_DIRECTORY_BYTES: Final = 4 << 20  # some 40,000 records
MAX_PICKLE_BYTES: Final = 1 << 20  # some 6,000 tensors; at worst read in some seconds
MAX_ORDER_BYTES: Final = 16
OLD_FORMAT: Final = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how files of torch.save began before torch 1.6
TAR_MARK: Final = (257, b"ustar")  # an older format still: the place and the mark of a tar archive
LOCAL_HEADER: Final = struct.Struct("<4s5H3I2H")  # section 4.3.7 of PKWARE's APPNOTE.TXT
ENCRYPTED: Final = 0x1 | 0x40 | 0x2000
SIZES_FOLLOW: Final = 0x8  # a flag: the sizes stand behind the record, and are 0 in its local header
UTF_8: Final = 0x800
IN_ZIP64: Final = 0xFFFFFFFF


class ArchiveEntry(NamedTuple):
    """Where a record's bytes are in the file."""

    offset: int
    size: int


def read_archive(path: Path, wanted: Container[str] | None) -> dict[str, Array]:
    """The tensors of an archive by name, all or those that are ``wanted``; floating point as float32, each contiguous.

    Tensors that share a storage share memory, which is the process's own. Blocks. Raises UnusableFile, OSError.
    """
    with _Bounded(io.FileIO(path)) as file:
        _refuse_other_formats(file)
        records = _records(file)
        if "byteorder" in records and _read(file, records, "byteorder", MAX_ORDER_BYTES) != b"little":
            raise UnusableFile("has its numbers in another byte order; save its weights as .safetensors")
        tensors = parse_state_dict(_read(file, records, "data.pkl", MAX_PICKLE_BYTES))
        _refuse_wrong_storages(records, dict.fromkeys(view.storage for view in tensors.values()))
        names: dict[Storage, dict[TensorView, list[str]]] = {}
        for name, view in tensors.items():
            if wanted is None or name in wanted:
                names.setdefault(view.storage, {}).setdefault(view, []).append(name)
        arrays: dict[str, Array] = {}
        for storage, views in names.items():
            numbers = read_array(file, records[f"data/{storage.key}"].offset, [storage.length], storage.dtype)
            for view, array in _tensors(numbers, views).items():
                arrays.update(dict.fromkeys(views[view], array))
        return arrays


def _tensors(numbers: Array, views: Iterable[TensorView]) -> dict[TensorView, Array]:
    """The tensors of one storage. Raises OnlyForTorch where their copies would need more memory than the storage."""
    arrays: dict[TensorView, Array] = {}
    copied = 0
    for view in views:
        item = numbers.itemsize
        try:  # numpy, too, refuses what is not within the storage
            strides = [stride * item for stride in view.strides]
            array = np.ndarray(view.shape, numbers.dtype, numbers, view.offset * item, strides)
        except ValueError:
            raise Damaged("a tensor's shape is too large") from None
        if not array.flags.c_contiguous:
            copied += array.size
            if copied > numbers.size:
                raise OnlyForTorch("holds tensors that overlap, which only torch reads")
            array = array.copy("C")
        arrays[view] = array
    return arrays


def _refuse_wrong_storages(records: dict[str, ArchiveEntry], storages: Iterable[Storage]) -> None:
    types: dict[str, str] = {}
    for storage in storages:
        record = records.get(f"data/{storage.key}")
        if record is None:
            raise Damaged("it lacks the numbers of a tensor")
        if types.setdefault(storage.key, storage.dtype) != storage.dtype:
            raise Damaged("a storage has two types")
        if record.size != storage.length * ITEM_BYTES[storage.dtype]:
            raise Damaged("a storage is not as long as its numbers")


class _Bounded(io.BufferedReader):
    """A file that is read in bounded pieces: zipfile would read a directory of whatever size the file states."""

    def read(self, size: int | None = -1, /) -> bytes:
        most = MAX_DIRECTORY_BYTES + 1
        data = super().read(most if size is None or size < 0 else min(size, most))
        if len(data) == most:
            raise zipfile.BadZipFile("its directory is too large")
        return data


def _read(file: io.BufferedReader, records: dict[str, ArchiveEntry], name: str, most: int) -> bytes:
    record = records.get(name)
    if record is None:
        raise Damaged(f"it has no {name}")
    if record.size > most:
        raise OnlyForTorch(f"has a {name} of more than {most:,} bytes, which only torch reads")
    file.seek(record.offset)
    return file.read(record.size)


def _refuse_other_formats(file: io.BufferedReader) -> None:
    begun = file.read(512)
    if begun.startswith(OLD_FORMAT):
        raise OnlyForTorch("has the format of torch before 1.6, which only torch reads")
    if begun[TAR_MARK[0] :].startswith(TAR_MARK[1]):
        raise UnusableFile("has the format of torch before 0.4, a tar archive; save its weights as .safetensors")
    if begun.startswith(b"\x80"):
        raise UnusableFile(
            "is a pickle and no archive of torch.save: it could run code; save its weights as .safetensors"
        )
    if not begun.startswith(b"PK\x03\x04"):
        raise Damaged("it is no archive of torch.save")


def _records(file: io.BufferedReader) -> dict[str, ArchiveEntry]:
    """The records by their names within the archive's folder. Raises UnusableFile."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries, directory = archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, OSError, struct.error) as error:
        raise Damaged(str(error)[:100]) from None
    entries.sort(key=lambda entry: entry.header_offset)
    begins = [entry.header_offset for entry in entries]
    if not entries or begins[0] != 0:
        raise Damaged("it does not begin with a record")
    folder = entries[0].orig_filename.partition("/")[0] + "/"
    names = [entry.orig_filename.removeprefix(folder) for entry in entries if entry.orig_filename.startswith(folder)]
    if len(set(names)) < len(entries):
        raise Damaged("a record is there twice, or in another folder than the first")
    if any(name == "constants.pkl" or name.startswith("code/") for name in names):
        raise UnusableFile("is a TorchScript program, and no weights; save the model's weights as .safetensors")
    if begins[-1] >= directory:
        raise Damaged("a record is not where its directory says")
    spans = [_span(file, entry) for entry in entries]
    if any(span.offset + span.size > end for span, end in zip(spans, [*begins[1:], directory], strict=True)):
        raise Damaged("its records overlap")
    return dict(zip(names, spans, strict=True))


def _span(file: io.BufferedReader, entry: zipfile.ZipInfo) -> ArchiveEntry:
    """Where an entry's bytes are, by its local header. Raises Damaged if the directory says otherwise."""
    if (
        entry.flag_bits & ENCRYPTED
        or entry.compress_type != zipfile.ZIP_STORED
        or entry.compress_size != entry.file_size
    ):
        raise Damaged("a record is compressed or encrypted, which torch.save does not do")
    file.seek(entry.header_offset)
    header = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size).ljust(LOCAL_HEADER.size))
    signature, _, flags, method, _, _, crc, *sizes, name_bytes, extra_bytes = header
    name = entry.orig_filename.encode("utf-8" if entry.flag_bits & UTF_8 else "cp437")
    told = {(entry.CRC, entry.compress_size, entry.file_size), (entry.CRC, IN_ZIP64, IN_ZIP64)}
    if flags & SIZES_FOLLOW:
        told.add((0, 0, 0))
    if (
        signature != b"PK\x03\x04"
        or (flags, method) != (entry.flag_bits, entry.compress_type)
        or (crc, *sizes) not in told
        or file.read(name_bytes) != name
    ):
        raise Damaged("a record's own header does not agree with the directory")
    return ArchiveEntry(entry.header_offset + LOCAL_HEADER.size + name_bytes + extra_bytes, entry.file_size)
