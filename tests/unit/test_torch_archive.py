"""What is no state dictionary of ``torch.save`` is refused with a sentence; nothing of it is run or ends the process."""

import os
import pickle
import struct
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.torch_archives import SIX, Storage, Tensor, opcodes, pickled, write_archive
from worker.model.torch_archive import MAX_DIRECTORY_BYTES, MAX_PICKLE_BYTES, read_archive
from worker.model.weight_arrays import UnusableFile

RUNS = "could run code"
GOOD = pickled({"a": Tensor()})


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self._reduced = (function, arguments, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self._reduced


def refusal(path: Path) -> str:
    with pytest.raises(UnusableFile) as refused:
        read_archive(path, None)
    return str(refused.value)


def test_what_these_tests_write_is_read(tmp_path: Path) -> None:
    found = read_archive(write_archive(tmp_path / "x.bin", GOOD, {"data/0": np.arange(6, dtype="<f4").tobytes()}), None)
    np.testing.assert_array_equal(found["a"], [[0, 1, 2], [3, 4, 5]])


# --- Tensors ---

TENSORS: dict[str, tuple[Tensor, str]] = {
    "an offset past the end": (Tensor(offset=1), "a tensor is larger than its storage"),
    "a shape past the end": (Tensor(shape=(3, 3)), "a tensor is larger than its storage"),
    "strides past the end": (Tensor(strides=(4, 1)), "a tensor is larger than its storage"),
    "an expanded tensor": (Tensor(shape=(2**40,), strides=(0,)), "holds tensors that repeat their numbers"),
    "sizes that overflow": (Tensor(shape=(2**33, 2**33)), "a tensor is larger than its storage"),
    "an offset below 0": (Tensor(offset=-1), "whole numbers, 0 or more"),
    "an offset that overflows": (Tensor(offset=2**63), "whole numbers, 0 or more"),
    "a size below 0": (Tensor(shape=(-2, -3)), "whole numbers, 0 or more"),
    "a stride below 0": (Tensor(offset=5, strides=(-3, -1)), "whole numbers, 0 or more"),
    "a size of another type": (Tensor(shape=(True, 2.0)), "whole numbers, 0 or more"),
    "fewer strides": (Tensor(strides=(1,)), "one for each axis"),
    "a hundred axes": (Tensor(shape=(1,) * 100, strides=(1,) * 100), "one for each axis"),
    "a shape too large though empty": (Tensor(shape=(0, 2**62, 2**62), strides=(0, 0, 0)), "shape is too large"),
    "a shape that is a number": (Tensor(shape=6), "with other values than torch.save does"),
    "a storage that is none": (Tensor(storage="0"), "with other values than torch.save does"),
    "a storage of another length": (Tensor(Storage(length=5), shape=(1, 1)), "a storage is not as long as its numbers"),
    "a longer storage": (Tensor(Storage(length=2**40)), "a storage is not as long as its numbers"),
    "a storage below 0": (Tensor(Storage(length=-6)), "names a storage otherwise"),
    "a storage of wider numbers": (Tensor(Storage(torch.DoubleStorage)), "a storage has two types"),
    "a storage of no type": (Tensor(Storage("FloatStorage")), "names a storage otherwise"),
    "a storage that is missing": (Tensor(Storage(key="1")), "it lacks the numbers of a tensor"),
    "a storage elsewhere": (Tensor(Storage(key="../../etc/passwd")), "it lacks the numbers of a tensor"),
    "a storage by number": (Tensor(Storage(key=0)), "names a storage otherwise"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_outside_of_its_storage_is_refused(tmp_path: Path, name: str) -> None:
    tensor, words = TENSORS[name]
    assert words in refusal(write_archive(tmp_path / "x.bin", pickled({"fine": Tensor(), "a": tensor})))


def test_a_storage_of_two_types_is_refused(tmp_path: Path) -> None:
    data = pickled({"a": Tensor(), "b": Tensor(Storage(torch.IntStorage))})
    assert "a storage has two types" in refusal(write_archive(tmp_path / "x.bin", data))


def test_a_small_file_of_many_overlapping_tensors_does_not_take_all_memory(tmp_path: Path) -> None:
    side = 1_000
    storage = Storage(length=side * side)
    turned = {str(i): Tensor(storage, i, (side - 1, side - 1), (1, side)) for i in range(1_000)}
    path = write_archive(tmp_path / "x.bin", pickled(turned), {"data/0": bytes(4 * side * side)})
    assert "holds tensors that overlap" in refusal(path)
    apart = {str(i): Tensor(storage, i, (side - 1, side), (side, 1)) for i in range(side)}
    found = read_archive(write_archive(path, pickled(apart), {"data/0": bytes(4 * side * side)}), None)
    assert all(np.shares_memory(found["0"], array) for array in found.values())


# --- Pickles ---


PICKLES: dict[str, tuple[bytes, str]] = {
    "a function": (pickled({"a": Call(os.system, "true")}), f"holds more than tensors ('posix system'), which {RUNS}"),
    "a class": (pickled({"a": Counter()}), "holds more than tensors ('collections Counter')"),
    "a method of a class that is known": (opcodes(b"ccollections\nOrderedDict.fromkeys\n"), RUNS),
    "another attribute of torch": (opcodes(b"ctorch\nload\n"), RUNS),
    "a whole model": (pickled(torch.nn.Linear(1, 1)), RUNS),
    "numbers that only torch reads": (opcodes(b"ctorch\nComplexFloatStorage\n"), "that only torch reads"),
    "a tensor that only torch makes": (opcodes(b"ctorch._utils\n_rebuild_sparse_tensor\n"), "that only torch reads"),
    "a dictionary made of pairs": (pickled(Call(OrderedDict, (("a", 1),))), "with other values than torch.save does"),
    "a call of a storage": (pickled(Call(torch.FloatStorage, 2**40)), "with other values than torch.save does"),
    "a call of a number": (opcodes(b"K\x01)R"), "with other values than torch.save does"),
    "a state for a tensor": (opcodes(pickled(Tensor())[2:-1], b"}b"), "an object with a state"),
    "a state for a function": (opcodes(b"ccollections\nOrderedDict\n}b"), "an object with a state"),
    "a state in two parts": (opcodes(b"}N}\x86b"), "an object with a state"),
    "a class without a call": (opcodes(b"ccollections\nOrderedDict\n)\x81"), "the pickle's opcode NEWOBJ"),
    "a class by the first protocol": (opcodes(b"(ios\nsystem\n"), "the pickle's opcode INST"),
    "an object by the first protocol": (opcodes(b"(ccollections\nOrderedDict\no"), "the pickle's opcode OBJ"),
    "an extension": (opcodes(b"\x82\x01"), "the pickle's opcode EXT1"),
    "an extension of four bytes": (opcodes(b"\x84\x01\0\0\0"), "the pickle's opcode EXT4"),
    "a global from the stack": (pickle.dumps(os.system, 4), "the pickle's opcode FRAME"),
    "a persistent id as text": (opcodes(b"P0\n"), "the pickle's opcode PERSID"),
    "a list": (pickled({"a": [1]}), "the pickle's opcode EMPTY_LIST"),
    "a long of many bytes": (opcodes(b"\x8b\0\0\0\x01", bytes(1 << 16)), "damaged (its pickle: "),
    "an endless text": (opcodes(b"X\xff\xff\xff\x7f"), "damaged (its pickle: "),
    "an endless number": (opcodes(b"I" + b"9" * 100_000 + b"\n"), "damaged (its pickle: "),
    "a text that is none": (opcodes(b"X\x01\0\0\0\xff"), "damaged (its pickle: "),
    "no end": (GOOD[:-1], "damaged (its pickle: "),
    "nothing": (b"", "damaged (its pickle: "),
    "an opcode that there is not": (opcodes(b"\xff"), "damaged (its pickle: "),
    "an empty stack": (opcodes(), "takes what is not there"),
    "a mark that is not there": (opcodes(b"t"), "takes what is not there"),
    "a stack that ends at a mark": (opcodes(b"N(\x85"), "takes what is not there"),
    "a memo that is not there": (opcodes(b"h\x05"), "takes what is not there"),
    "a memo at a high place": (opcodes(b"Nr\xff\xff\xff\x7f"), "holds no state dictionary"),
    "many marks": (opcodes(b"(" * 100_000), "nested too deep"),
    "deep tuples": (opcodes(b")", b"\x85" * 300_000), "holds no state dictionary"),
    "deep tuples as a name": (opcodes(b"})", b"\x85" * 300_000, b"Ns"), "one that is no text"),
    "a name twice": (opcodes(b"}(X\x01\0\0\0aNX\x01\0\0\0aNu"), "a name twice"),
    "a name that is a number": (opcodes(b"}K\x01Ns"), "one that is no text"),
    "a name without a value": (opcodes(b"}(X\x01\0\0\0au"), "an entry of what is no dictionary"),
    "an entry of a tuple": (opcodes(b")X\x01\0\0\0aNs"), "an entry of what is no dictionary"),
    "a dictionary within itself": (opcodes(b"}q\0X\x01\0\0\0ah\0s"), "holds 'a', which is no tensor"),
    "tuples that double": (opcodes(b")q\0", b"h\0h\0\x86q\0" * 10_000), "holds no state dictionary"),
    "a dictionary inside": (pickled({"state_dict": {"a": Tensor()}, "epoch": 3}), "holds 'state_dict', which is no tensor"),
    "a tensor alone": (pickled(Tensor()), "holds no state dictionary"),
    "the newest protocol": (pickled({"a": Tensor()}, 5), "the pickle's opcode FRAME"),
    "too much": (opcodes(b"N" * MAX_PICKLE_BYTES), "has a data.pkl of more than 1,048,576 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_of_more_than_tensors_is_refused(tmp_path: Path, name: str) -> None:
    data, words = PICKLES[name]
    sentence = refusal(write_archive(tmp_path / "x.bin", data))
    assert words in sentence
    assert len(sentence) < 300
    assert "\n" not in sentence


# --- Archives ---


def edited(path: Path, change: Callable[[bytearray], None]) -> Path:
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)
    return path


def local(content: bytearray, name: bytes) -> int:
    """Where the record's own header begins."""
    return content.index(name) - 30


def central(content: bytearray, name: bytes) -> int:
    """Where the record begins in the directory."""
    return content.rindex(name) - 46


NUMBERS = b"archive/data/0"


def patch(place: Callable[[bytearray, bytes], int], offset: int, value: bytes) -> Callable[[bytearray], None]:
    def change(content: bytearray) -> None:
        begin = place(content, NUMBERS) + offset
        content[begin : begin + len(value)] = value

    return change


def flag(bits: int) -> Callable[[bytearray], None]:
    def change(content: bytearray) -> None:
        for begin in (local(content, NUMBERS) + 6, central(content, NUMBERS) + 8):
            content[begin : begin + 2] = struct.pack("<H", bits)

    return change


def over_another(content: bytearray) -> None:
    """The numbers are said to be where the pickle is: no byte of the file is its own."""
    begin = central(content, b"archive/byteorder")
    content[begin + 42 : begin + 46] = struct.pack("<I", 0)


def longer(content: bytearray) -> None:
    """The numbers are said to be longer than they are, by both headers."""
    for begin in (local(content, NUMBERS) + 18, central(content, NUMBERS) + 20):
        content[begin : begin + 8] = struct.pack("<II", 1_000, 1_000)


def begun(content: bytearray) -> None:
    content[:0] = b"PK\x03\x04" + bytes(100)


def outside(content: bytearray) -> None:
    content[:] = content.replace(NUMBERS, b"outside/data/0")


AGREE = "a record's own header does not agree with the directory"
PACKED = "a record is compressed or encrypted"
EDITS: dict[str, tuple[Callable[[bytearray], None], str]] = {
    "encrypted": (flag(0x1), PACKED),
    "encrypted strongly": (flag(0x41), PACKED),
    "encrypted in its own header": (patch(local, 6, b"\x01\0"), AGREE),
    "compressed in its own header": (patch(local, 8, b"\x08\0"), AGREE),
    "compressed in the directory": (patch(central, 10, b"\x08\0"), PACKED),
    "of two lengths": (patch(central, 20, b"\x01\0\0\0"), PACKED),
    "shorter in its own header": (patch(local, 18, struct.pack("<II", 4, 4)), AGREE),
    "of another name in its own header": (patch(local, 30, b"archive/data/1"), AGREE),
    "of another sum in its own header": (patch(local, 14, b"\x01\x02\x03\x04"), AGREE),
    "without a header": (patch(local, 0, b"PK\x05\x06"), AGREE),
    "over another": (over_another, AGREE),
    "longer than the file": (longer, "its records overlap"),
    "in front of the file": (patch(central, 42, struct.pack("<I", 2**31)), "is damaged"),
    "behind something else": (begun, "it does not begin with a record"),
    "outside of the folder": (outside, "in another folder"),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_a_record_that_torch_would_not_write_is_refused(tmp_path: Path, name: str) -> None:
    change, words = EDITS[name]
    assert words in refusal(edited(write_archive(tmp_path / "x.bin", GOOD), change))


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compressed_archive_is_refused(tmp_path: Path, method: int) -> None:
    bomb = write_archive(tmp_path / "x.bin", GOOD, {"data/0": bytes(1 << 24)}, compression=method)
    assert PACKED in refusal(bomb)


RECORDS: dict[str, tuple[dict[str, bytes], str]] = {
    "big-endian": ({"byteorder": b"big"}, "has its numbers in another byte order"),
    "no byte order": ({"byteorder": b"\xff" * 16}, "has its numbers in another byte order"),
    "a long byte order": ({"byteorder": b"little" * 10}, "has a byteorder of more than 16 bytes"),
    "a program": ({"constants.pkl": b"\x80\x02N."}, "is a TorchScript program"),
    "code": ({"code/__torch__.py": b"print()"}, "is a TorchScript program"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_an_archive_with_other_records_is_refused(tmp_path: Path, name: str) -> None:
    records, words = RECORDS[name]
    assert words in refusal(write_archive(tmp_path / "x.bin", GOOD, records))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_record_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "x.bin", GOOD)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data.pkl", pickled({"b": Tensor()}))
    assert "a record is there twice" in refusal(path)


def test_records_that_overlap_are_refused(tmp_path: Path) -> None:
    """One record inside another: each agrees with its header, and the file is smaller than what it holds."""
    inner = b"archive/data/1"
    header = struct.pack("<4s5H3I2H", b"PK\x03\x04", 20, 0, 0, 0, 0, zlib.crc32(SIX), 24, 24, len(inner), 0)
    path = write_archive(tmp_path / "x.bin", GOOD, {"data/0": header + inner + SIX, "data/1": SIX})
    content = bytearray(path.read_bytes())
    entry = central(content, inner)
    content[entry + 42 : entry + 46] = struct.pack("<I", content.index(header))
    path.write_bytes(content)
    assert "its records overlap" in refusal(path)


def test_a_directory_too_large_is_refused(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "x.bin", GOOD)
    with zipfile.ZipFile(path, "a") as archive:
        for number in range(MAX_DIRECTORY_BYTES // 65_000 + 1):
            entry = zipfile.ZipInfo(f"archive/{number}")
            entry.comment = b"x" * 65_000
            archive.writestr(entry, b"")
    assert "its directory is too large" in refusal(path)


def test_an_archive_without_a_pickle_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        archive.writestr("archive/data/0", SIX)
    assert "it has no data.pkl" in refusal(tmp_path / "x.bin")
    zipfile.ZipFile(tmp_path / "x.bin", "w").close()
    assert "it is no archive of torch.save" in refusal(tmp_path / "x.bin")


def test_an_archive_with_sizes_of_eight_bytes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {"data.pkl": GOOD, "data/0": np.arange(6, dtype="<f4").tobytes()}.items():
            with archive.open(f"archive/{name}", "w", force_zip64=True) as record:
                record.write(content)
    assert read_archive(path, None)["a"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_other_formats_of_torch_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert "format of torch before 1.6" in refusal(path)
    path.write_bytes(bytes(257) + b"ustar\x0000" + bytes(300))
    assert "a tar archive" in refusal(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    assert RUNS in refusal(path)
    torch.jit.save(torch.jit.trace(torch.nn.Linear(1, 1), torch.ones(1)), path)
    assert "is a TorchScript program" in refusal(path)
