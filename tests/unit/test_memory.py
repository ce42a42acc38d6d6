"""What the allocator is asked for, and that it agrees."""

import ctypes
import platform
from types import SimpleNamespace

import pytest

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
