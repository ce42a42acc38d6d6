"""Threads, token budget and micro-batch follow what is measured, within a bound of time."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from worker.model import autotune as tuning
from worker.model.autotune import (
    CpuTuning,
    available_cores,
    best_batch_texts,
    fastest,
    measure_batches,
    measure_pass,
    tune_batch_texts,
    tune_budget,
    tune_cpu,
    tune_threads,
)


def never(*_: object) -> NDArray[np.float32]:
    raise AssertionError


@pytest.mark.parametrize(
    ("seconds", "threads"),
    [
        ({8: 1.0, 4: 1.0, 2: 1.0, 1: 1.0}, 8),
        ({8: 2.0, 4: 1.01, 2: 1.0, 1: 1.0}, 4),
        ({8: 9.0, 4: 5.0, 2: 2.0, 1: 1.0}, 1),
    ],
)
def test_the_fewest_threads_that_are_about_as_fast(
    seconds: dict[int, float], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "_concurrent_passes_s", lambda _, ids, count, __: seconds[count])
    monkeypatch.setattr(tuning, "available_cores", lambda: 8)
    assert tune_threads(never, 99) == threads


def test_the_smallest_budget_with_about_the_most_tokens_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    used = [budget // 48 * 48 for budget in tuning.CPU_BUDGETS]
    took = dict(zip(used, (1.0, 1.5, 2.0, 4.0, 8.1, 17.0), strict=True))
    monkeypatch.setattr(tuning, "_pass_s", lambda _, ids, __: took[ids.size])
    assert tune_budget(never, "cpu", 128, 99) == 1_024
    assert tune_budget(never, "cpu", 2_000, 99) == 2_048
    took[10_000 // 48 * 48] = 1.0
    assert tune_budget(never, "cpu", 10_000, 99) == 10_000


def test_of_two_that_are_good_at_different_loads_the_ratios_decide() -> None:
    assert fastest({"torch": (1.0, 10.0), "onnx": (0.5, 15.0)}) == "onnx"
    assert fastest({"torch": (1.0, 10.0), "onnx": (0.5, 21.0)}) == "torch"
    assert fastest({"torch": (1.0, 10.0), "onnx": (1.0, 10.0)}) == "torch"


def test_more_time_measures_more() -> None:
    def slow(ids: NDArray[np.int64], _: object) -> NDArray[np.float32]:
        calls.append(ids.size)
        time.sleep(0.01)
        return np.zeros(1, np.float32)

    measured = []
    for tuning_s in (0.0, 10.0):
        calls: list[int] = []
        tune_budget(slow, "cpu", 1, tuning_s)
        measured.append(len(set(calls)))
    assert measured == [0, len(tuning.CPU_BUDGETS)]


@pytest.mark.parametrize(
    ("overhead_s", "token_s", "tokens"),
    [(0.002, 0.0001, 20), (0, 0.0001, tuning.MIN_PASS_TOKENS), (1, 0.0001, tuning.MAX_PASS_TOKENS), (1, 0, 128)],
)
def test_what_a_pass_costs_in_tokens(
    overhead_s: float, token_s: float, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "_pass_s", lambda _, ids, __: overhead_s + token_s * ids.size)
    assert measure_pass(never, 99)[0] == tokens


def test_a_slow_model_is_not_measured_for_long() -> None:
    calls = []

    def slow(ids: NDArray[np.int64], _: object) -> NDArray[np.float32]:
        calls.append(ids.size)
        time.sleep(tuning.TUNING_S)
        return np.zeros(1, np.float32)

    assert tune_budget(slow, "cpu", 48) == tuning.CPU_BUDGETS[0]
    assert set(calls) == {tuning.CPU_BUDGETS[0] // 48 * 48}
    tune_threads(slow)
    assert len(calls) <= 12


@pytest.mark.parametrize("tokens_per_s", [2_000, 20_000, 60_000, 1_000_000])
def test_measuring_ends_within_its_bound(tokens_per_s: int, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]

    def model(ids: NDArray[np.int64], _: object) -> NDArray[np.float32]:
        now[0] += ids.size / tokens_per_s
        return np.zeros(1, np.float32)

    monkeypatch.setattr(tuning, "available_cores", lambda: 1)  # this clock adds up what runs at once
    for clock in ("monotonic", "perf_counter"):
        monkeypatch.setattr(tuning.time, clock, lambda: now[0])
    assert tune_cpu(model, 512, "auto", "auto", tuning.TUNING_S).max_batch_tokens >= 512
    assert now[0] - 100 <= 1.1 * tuning.TUNING_S


def test_what_is_given_is_not_measured() -> None:
    def model(ids: NDArray[np.int64], _: object) -> NDArray[np.float32]:
        assert ids.size <= tuning.EXAMPLE_TOKENS
        return np.zeros(1, np.float32)

    assert tune_cpu(model, 512, 3, 700, tuning.TUNING_S)[:2] == CpuTuning(3, 700, 0)[:2]


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


@pytest.mark.parametrize("max_tokens", [3, 20, 48])
def test_no_text_is_measured_that_the_model_does_not_take(max_tokens: int) -> None:
    def model(ids: NDArray[np.int64], _: object) -> NDArray[np.float32]:
        assert ids.shape[1] <= max_tokens
        return np.zeros(1, np.float32)

    tune_cpu(model, max_tokens, "auto", "auto", 0.05)


# Micro-batches.


def timed(monkeypatch: pytest.MonkeyPatch, text_s: float, call_s: float = 0.0) -> Callable[[int], None]:
    """A model on a device that takes so long for a text and for a call, by a clock of its own."""
    now = [100.0]

    def run(texts: int) -> None:
        now[0] += call_s + text_s * texts

    for clock in ("monotonic", "perf_counter"):
        monkeypatch.setattr(tuning.time, clock, lambda: now[0])
    return run


@pytest.mark.parametrize(
    ("seconds", "texts"),
    [
        ({512: 1.0, 1_024: 1.0, 2_048: 1.0}, 2_048),
        ({512: 1.0, 1_024: 2.0, 2_048: 4.0}, 512),
        ({512: 1.0, 1_024: 1.95, 2_048: 3.9}, 512),
        ({512: 1.0, 1_024: 1.5, 2_048: 2.95}, 1_024),
        ({512: 1.0, 1_024: 1.5, 2_048: 3.5}, 1_024),
        ({512: 3.0}, 512),
    ],
)
def test_the_smallest_micro_batch_that_is_about_as_fast_as_any(seconds: dict[int, float], texts: int) -> None:
    assert best_batch_texts(seconds) == texts


@given(st.dictionaries(st.integers(1, 100_000), st.floats(1e-6, 1e3), min_size=1))
def test_no_micro_batch_is_much_faster_than_the_recommended_one(seconds: dict[int, float]) -> None:
    best = best_batch_texts(seconds)
    fastest_text_s = min(took_s / texts for texts, took_s in seconds.items())
    assert seconds[best] / best <= tuning.MIN_GAIN * fastest_text_s * (1 + 1e-9)
    assert all(
        seconds[texts] / texts > tuning.MIN_GAIN * fastest_text_s * (1 - 1e-9) for texts in seconds if texts < best
    )


def test_where_a_call_costs_much_a_micro_batch_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = measure_batches(timed(monkeypatch, 1e-6, call_s=0.01))
    assert tuple(seconds) == tuning.CUDA_BATCH_TEXTS
    assert seconds[512] == pytest.approx(0.01 + 512e-6)
    assert tune_batch_texts("cuda", lambda: seconds) == 8_192


def test_a_cpu_is_not_measured() -> None:
    assert tune_batch_texts("cpu", never) == 512


@pytest.mark.parametrize("text_s", [1e-7, 1e-5, 1e-4, 1e-3])
def test_micro_batches_are_measured_within_their_time(text_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    run = timed(monkeypatch, text_s)
    run(0)
    began = tuning.time.monotonic()
    assert measure_batches(run, 1.0)
    first_s = 512 * text_s
    assert tuning.time.monotonic() - began <= 1.05 + 3 * first_s


def test_what_does_not_fit_into_memory_is_left_out() -> None:
    def run(texts: int) -> None:
        if texts > 2_048:
            raise MemoryError

    assert set(measure_batches(run)) == {512, 1_024, 2_048}
    assert measure_batches(never_enough) == {}
    assert tune_batch_texts("cuda", dict) == 512
    with pytest.raises(ValueError, match="broken"):
        measure_batches(broken_beyond_512)


def never_enough(_: int) -> NDArray[np.float32]:
    raise MemoryError


def broken_beyond_512(texts: int) -> None:
    if texts > 512:
        raise ValueError("broken")


def test_a_budget_that_does_not_fit_into_memory_is_not_taken() -> None:
    def forward(ids: NDArray[np.int64], _: object) -> NDArray[np.float32]:
        if ids.size > 20_000:
            raise MemoryError
        return np.zeros(1, np.float32)

    assert tune_budget(forward, "cuda", 512, 5) <= 16_384
    assert tune_budget(lambda *_: never_enough(0), "cuda", 512) == tuning.CUDA_BUDGETS[0]
