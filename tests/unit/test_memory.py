"""What the allocator is asked for, and that it agrees."""

import ctypes
import platform
from types import SimpleNamespace

import pytest

from worker.model.library_errors import as_model_error
from worker.runtime import memory


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    calls: list[tuple[int, int]] = []
    libc = SimpleNamespace(mallopt=lambda parameter, value: calls.append((parameter, value)) or value <= 1 << 25)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: libc)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.31"))
    return calls


def test_both_thresholds_are_raised_as_far_as_any_glibc_allows(asked: list[tuple[int, int]]) -> None:
    memory.keep_freed_blocks()
    assert asked == [(-3, 1 << 25), (-1, 1 << 25)]


def test_where_the_first_is_refused_the_second_is_left_alone(
    asked: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "LARGEST_BLOCK", 1 << 30)
    memory.keep_freed_blocks()
    assert asked == [(-3, 1 << 30)]


def test_another_libc_is_left_alone(asked: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    memory.keep_freed_blocks()
    assert not asked


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this libc is another one")
def test_this_glibc_agrees() -> None:
    assert ctypes.CDLL(None).mallopt(memory.M_MMAP_THRESHOLD, memory.LARGEST_BLOCK) == 1


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (MemoryError(), True),
        (RuntimeError("AllocateRawInternal() Failed to allocate memory for requested buffer of size 805306368"), True),
        (RuntimeError("Non-zero status code returned while running MatMulIntegerToFloat node. std::bad_alloc"), True),
        (RuntimeError("Non-zero status code returned while running Gather node. Index out of bounds"), False),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_the_words_of_libraries_for_want_of_memory_are_known(error: Exception, is_it: bool) -> None:
    """Those of ONNX Runtime 1.20 and later, its arena's and those of a kernel that allocates by itself; those of CUDA for
    pinned memory and of cuBLAS, for which torch has no class of their own.
    """
    assert memory.is_out_of_memory(error) == is_it


def test_a_model_for_which_there_is_no_memory_is_not_called_wrong() -> None:
    with pytest.raises(RuntimeError, match="allocate memory"), as_model_error("here", "loaded"):
        raise RuntimeError("Failed to allocate memory for requested buffer of size 805306368")
