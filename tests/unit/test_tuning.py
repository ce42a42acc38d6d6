"""Threads and token budget follow what is measured, within a bound of time."""

import time
from pathlib import Path

import pytest
import torch

from worker import tuning
from worker.tuning import available_cores, tune_budget, tune_threads

CPU = torch.device("cpu")


def costing(monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float]) -> None:
    """Makes a pass take so long, by its texts or by the threads."""
    monkeypatch.setattr(
        tuning, "_took", lambda _, ids: seconds.get(ids.numel() // 48 * 48) or seconds[torch.get_num_threads()]
    )


def never(*_: object) -> torch.Tensor:
    raise AssertionError


@pytest.fixture(autouse=True)
def threads_as_before() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("seconds", "threads"),
    [
        ({8: 1.0, 4: 2.0, 2: 4.0, 1: 8.0}, 8),
        ({8: 1.0, 4: 1.01, 2: 1.5, 1: 3.0}, 4),
        ({8: 4.0, 4: 2.0, 2: 1.0, 1: 1.0}, 1),
    ],
)
def test_the_fewest_threads_that_are_about_as_fast(
    seconds: dict[int, float], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    costing(monkeypatch, seconds)
    monkeypatch.setattr(tuning, "available_cores", lambda: 8)
    assert tune_threads(never) == threads == torch.get_num_threads()


def test_the_budget_with_the_most_tokens_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    used = [budget // 48 * 48 for budget in tuning.CPU_BUDGETS]
    costing(monkeypatch, dict(zip(used, (1.0, 1.5, 2.0, 4.0, 8.1, 17.0), strict=True)))
    assert tune_budget(never, CPU, 128) == 1_024
    assert tune_budget(never, CPU, 2_000) == 2_000


def test_a_slow_network_is_not_measured_for_long() -> None:
    calls = []

    def slow(ids: torch.Tensor, _: object) -> torch.Tensor:
        calls.append(ids.numel())
        time.sleep(tuning.PATIENCE_S)
        return torch.zeros(1)

    assert tune_budget(slow, CPU, 1) == tuning.CPU_BUDGETS[0]
    assert set(calls) == {tuning.CPU_BUDGETS[0] // 48 * 48}
    tune_threads(slow)
    assert len(calls) <= 6


@pytest.mark.parametrize(("text", "cores"), [("max 100000", 8), ("150000 100000", 2), ("5000 100000", 1), ("", 8)])
def test_cores_are_those_of_the_container(
    text: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(text)
    monkeypatch.setattr(tuning, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(tuning.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert available_cores() == cores
    monkeypatch.setattr(tuning, "CPU_QUOTA", tmp_path / "none")
    assert available_cores() == 8
