"""Whatever the bytes of an archive or a pickle are, they are read or refused with a sentence, and nothing of them is run."""

import pickle
import pickletools
import random
import struct
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.torch_archives import SIX, Storage, Tensor, opcodes, pickled, write_archive
from worker.model.torch_archive import read_archive
from worker.model.torch_pickle import parse_state_dict
from worker.model.weight_arrays import UnusableFile

GOOD = pickled({"a": Tensor()})
OPCODES = [b"}", b"(", b"s", b"u", b"t", b"b", b"Q", b"R"]


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("valid") / "x.bin"
    weight = torch.randn(3, 4)
    torch.save(OrderedDict(a=weight, b=weight.T, c=torch.ones(5).half(), d=torch.arange(3), e=torch.tensor(1.5)), path)
    return path.read_bytes()


def assert_read_or_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    found, sentence = outcome(lambda: read_archive(path, None))
    assert sentence.isprintable()
    assert len(sentence) < 300
    for array in found.values():
        assert array.flags.c_contiguous
        assert array.nbytes <= 2 * len(content)  # float32 of float16
        array.copy()  # a view beyond its memory would be a fault


def outcome(read: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """What is read, or the sentence that refuses it."""
    try:
        return read(), ""
    except UnusableFile as error:
        return {}, str(error)


anywhere = settings(max_examples=150, deadline=60_000, suppress_health_check=[HealthCheck.function_scoped_fixture])
mutations = st.lists(
    st.tuples(st.sampled_from(["set", "insert", "delete"]), st.integers(0, 2**16), st.binary(min_size=1, max_size=8)),
    min_size=1,
    max_size=5,
)


def mutated(content: bytes, changes: list[tuple[str, int, bytes]]) -> bytes:
    result = bytearray(content)
    for kind, place, value in changes:
        begin = place % (len(result) + 1)
        result[begin : begin + (0 if kind == "insert" else len(value))] = b"" if kind == "delete" else value
    return bytes(result)


@anywhere
@given(changes=mutations)
def test_a_file_with_changed_bytes_is_read_or_refused(valid: bytes, tmp_path: Path, changes: Any) -> None:
    assert_read_or_refused(tmp_path / "x.bin", mutated(valid, changes))


@anywhere
@given(changes=mutations)
def test_a_pickle_with_changed_bytes_is_read_or_refused(tmp_path: Path, changes: Any) -> None:
    data = pickled(OrderedDict(a=Tensor(), b=Tensor(Storage(torch.HalfStorage, "1", 12), 2, (2, 2), (1, 2))))
    write_archive(tmp_path / "x.bin", mutated(data, changes), {"data/1": SIX})
    assert_read_or_refused(tmp_path / "x.bin", (tmp_path / "x.bin").read_bytes())


@pytest.mark.parametrize("seed", range(20))
def test_a_pickle_of_opcodes_in_any_order_is_read_or_refused_and_runs_nothing(tmp_path: Path, seed: int) -> None:
    """Parts of pickles that call, build and store, in any order, some of them with random arguments."""
    trace = tmp_path / "it-ran"
    command = f"touch {trace}".encode()
    touch = b"cos\nsystem\nX" + struct.pack("<I", len(command)) + command + b"\x85R"
    pickle.loads(opcodes(touch))
    trace.unlink()  # so it would run
    generator = random.Random(seed)
    codes = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
    parts = [touch, GOOD[2:-1], b"ccollections\nOrderedDict\n", b")R", b"K\x01", b"X\x01\0\0\0a", *OPCODES]
    for _ in range(500):
        chosen = [
            generator.choice(parts)
            if generator.random() < 0.8
            else generator.choice(codes) + generator.randbytes(generator.randrange(6))
            for _ in range(generator.randrange(1, 15))
        ]
        _, sentence = outcome(partial(parse_state_dict, opcodes(*chosen)))
        assert len(sentence) < 300
    assert not trace.exists()


plain = st.none() | st.integers() | st.floats() | st.text() | st.binary()
values = st.recursive(
    plain, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner)
)


@given(value=values, protocol=st.integers(0, 5))
def test_a_pickle_of_other_values_is_read_or_refused(value: Any, protocol: int) -> None:
    found, sentence = outcome(lambda: parse_state_dict(pickle.dumps(value, protocol)))
    assert found == {}
    assert len(sentence) < 300
