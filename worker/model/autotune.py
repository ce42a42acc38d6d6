"""Measures this machine: token budget, threads and micro-batch that ``auto`` takes, and what ``bench`` recommends.

The commands that score and ``bench`` choose by the same functions. Those that measure block, for about as long as their
argument ``tuning_s`` says.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from worker.runtime.memory import free_device_memory, is_out_of_memory

log = logging.getLogger(__name__)
Name = TypeVar("Name", bound=Hashable)

Forward = Callable[[NDArray[np.int64], NDArray[np.int64] | None], NDArray[np.float32]]
"""Padded ids (N, T) and lengths (N), or None where each text has T tokens → logits (N, labels). A call blocks."""

EXAMPLE_LENGTH: Final = 48  # tokens; the mean of reviews and of posts
EXAMPLE_TOKENS: Final = 1_024
CPU_BUDGETS: Final = (256, 512, 1_024, 2_048, 4_096, 8_192)
CUDA_BUDGETS: Final = (4_096, 8_192, 16_384, 32_768, 65_536)
BATCH_TEXTS: Final = 512  # of a micro-batch on a CPU, where larger ones are no faster
CUDA_BATCH_TEXTS: Final = (512, 1_024, 2_048, 4_096, 8_192)
BATCH_TUNING_S: Final = 1.0  # of micro-batches on a GPU
TUNING_S: Final = 0.3
MEASURING_S: Final = 0.05  # of one pass that is repeated, at most
MIN_PASS_TOKENS: Final = 8  # the bounds hold whatever a noisy machine shows
MAX_PASS_TOKENS: Final = 128
MIN_GAIN: Final = 1.03  # a larger budget pads more, and a thread takes a core from others: either has to gain this much
CPU_QUOTA: Final = Path("/sys/fs/cgroup/cpu.max")  # "max 100000" or "150000 100000": microseconds of a period


class CpuTuning(NamedTuple):
    """What was chosen for a CPU. ``pass_tokens``: the tokens that are computed in the time that one more pass costs."""

    cpu_threads: int
    max_batch_tokens: int
    pass_tokens: int


def available_cores() -> int:
    """The number of cores that this process may use, by its affinity and by its container's quota; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CPU_QUOTA.read_text().split()
        cores = min(cores, -(-int(quota) // int(period)))
    except (OSError, ValueError):  # there is no quota
        pass
    return max(1, cores)


def fastest(took: Mapping[Name, Sequence[float]]) -> Name:
    """The fastest backend by the geometric mean of its times, in seconds, for one text and for a full batch.

    A light load has single texts and a backlog has full batches. The first of equally fast ones is taken.
    """
    return min(took, key=lambda name: math.prod(took[name]))


def smallest_at_full_speed(speeds: Mapping[int, float]) -> int:
    """The smallest number (of threads, of tokens) that a larger one does not surpass in speed by more than MIN_GAIN."""
    highest = max(speeds.values())
    return min(number for number, speed in speeds.items() if speed * MIN_GAIN >= highest)


def candidate_budgets(device: str, max_tokens: int) -> list[int]:
    """Token budgets to measure on ``cpu`` or ``cuda``; none is below ``max_tokens``, the model's longest text."""
    budgets = CUDA_BUDGETS if device == "cuda" else CPU_BUDGETS
    return [budget for budget in budgets if budget >= max_tokens] or [max_tokens]


def best_batch_texts(seconds: Mapping[int, float]) -> int:
    """How many texts a micro-batch should have, by the seconds that the model takes for each number of texts measured.

    The smallest number that is about as fast a text as any larger one. A larger one costs no latency, because a micro-batch
    is closed by the linger where events are few. A worker's start and ``bench`` both ask this function.
    """
    return smallest_at_full_speed({texts: texts / took_s for texts, took_s in seconds.items()})


def tune_batch_texts(device: str, measure: Callable[[], Mapping[int, float]]) -> int:
    """How many texts a worker's micro-batch has: BATCH_TEXTS on a CPU, on a GPU what ``measure`` shows to be best.

    ``measure`` answers with what ``measure_batches`` does; it is called on a GPU alone, and blocks for a second or two.
    """
    if device == "cpu":
        return BATCH_TEXTS
    seconds = measure()
    best = best_batch_texts(seconds) if seconds else BATCH_TEXTS
    speeds = {texts: round(texts / took_s) for texts, took_s in seconds.items()}
    log.info("measured the micro-batch", extra={"max_batch_texts": best, "texts_per_s": speeds})
    return best


def measure_batches(run: Callable[[int], object], measuring_s: float = BATCH_TUNING_S) -> dict[int, float]:
    """Seconds of a micro-batch by its number of texts, for those of CUDA_BATCH_TEXTS that fit into memory and time.

    ``run`` has the model compute a micro-batch of so many texts. The first call is not measured, because a device loads
    what it computes with when it first needs it. Blocks for about ``measuring_s`` after that call.
    """
    seconds: dict[int, float] = {}
    try:
        run(CUDA_BATCH_TEXTS[0])
        deadline, text_s = time.monotonic() + measuring_s, 0.0
        for texts in CUDA_BATCH_TEXTS:
            left_s = deadline - time.monotonic()
            if left_s < 2 * texts * text_s:
                break
            seconds[texts] = shortest_run_s(partial(run, texts), left_s / 2)
            text_s = seconds[texts] / texts
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        free_device_memory()
    return seconds


def tune_cpu(
    forward: Forward,
    max_tokens: int,
    cpu_threads: int | Literal["auto"],
    max_batch_tokens: int | Literal["auto"],
    tuning_s: float,
) -> CpuTuning:
    """Measures what is ``auto``, and leaves the rest as it is given. Takes ``tuning_s`` seconds in all at most.

    It takes longer only with a model that needs a third of that for one text of 48 tokens. Where there is no time to
    measure, the smallest budget and a thread for each core are taken.
    """
    deadline = time.monotonic() + tuning_s
    length = example_length(max_tokens)
    pass_tokens, token_s = measure_pass(forward, tuning_s / 4, length)
    if max_batch_tokens == "auto":
        max_batch_tokens = tune_budget(forward, "cpu", max_tokens, tuning_s / 2, token_s)
    if cpu_threads == "auto":
        cpu_threads = tune_threads(forward, deadline - time.monotonic(), token_s, length)
    return CpuTuning(cpu_threads, max_batch_tokens, pass_tokens)


def tune_threads(
    forward: Forward, tuning_s: float = TUNING_S, token_s: float = 0.0, length: int = EXAMPLE_LENGTH
) -> int:
    """Measures how many passes at once, each on a CPU thread, score most texts; the smallest number at full speed.

    ``token_s``: the seconds that a token is known to take. ``length``: of a text, in tokens. Measures nothing that would
    last beyond ``tuning_s``.
    """
    ids = example(EXAMPLE_TOKENS, length)
    speeds: dict[int, float] = {}
    threads, took_s = available_cores(), ids.size * token_s
    deadline = time.monotonic() + tuning_s
    while threads and (left_s := deadline - time.monotonic()) > 2 * took_s:
        took_s = _concurrent_passes_s(forward, ids, threads, left_s / 2)
        speeds[threads] = threads / took_s
        threads //= 2
    return smallest_at_full_speed(speeds) if speeds else threads


def tune_budget(
    forward: Forward, device: str, max_tokens: int, tuning_s: float = TUNING_S, token_s: float = 0.0
) -> int:
    """Measures tokens a second by token budget; the smallest budget at full speed, at least ``max_tokens``.

    A budget for which memory does not suffice is left out, and so are larger ones. ``token_s``: as for tune_threads.
    """
    speeds: dict[int, float] = {}
    deadline = time.monotonic() + tuning_s
    budgets = candidate_budgets(device, max_tokens)
    for budget in budgets:
        left_s = deadline - time.monotonic()
        if left_s < 2 * budget * token_s:
            break
        ids = example(budget, example_length(max_tokens))
        try:
            took_s = _pass_s(forward, ids, left_s / 2)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            free_device_memory()
            break
        speeds[budget], token_s = ids.size / took_s, took_s / ids.size
    best = smallest_at_full_speed(speeds) if speeds else budgets[0]
    log.info("measured the token budget", extra={"max_batch_tokens": best, "budgets": list(speeds)})
    return best


def measure_pass(forward: Forward, tuning_s: float = TUNING_S, length: int = EXAMPLE_LENGTH) -> tuple[int, float]:
    """What one more pass costs on a CPU, in tokens that it could compute meanwhile (8 to 128), and seconds of a token.

    ``length``: of a text, in tokens.
    """
    one_s = _pass_s(forward, example(length, length), tuning_s / 3)
    texts = EXAMPLE_TOKENS // length
    while texts > 1 and 3 * texts * one_s > tuning_s:  # a text alone takes longer than one of many: this bounds it
        texts //= 2
    if texts == 1:
        return MIN_PASS_TOKENS, one_s / length
    full_s = _pass_s(forward, example(texts * length, length), tuning_s / 3)
    token_s = (full_s - one_s) / ((texts - 1) * length)
    if token_s <= 0:
        return MAX_PASS_TOKENS, full_s / (texts * length)
    overhead = round(one_s / token_s) - length
    return min(max(overhead, MIN_PASS_TOKENS), MAX_PASS_TOKENS), token_s


def example_length(max_tokens: int) -> int:
    """The tokens of a text that is measured with, for a model that takes ``max_tokens`` at most."""
    return min(EXAMPLE_LENGTH, max_tokens)


def example(tokens: int, length: int) -> NDArray[np.int64]:
    """Token ids (N, ``length``) with about so many tokens."""
    return np.full((max(1, tokens // length), length), 1, np.int64)


def shortest_run_s(function: Callable[[], object], measuring_s: float = MEASURING_S) -> float:
    """Seconds of the shortest of 2 to 8 calls, the first left out: the least disturbed by a noisy machine."""
    runs: list[float] = []
    while len(runs) < 2 or (len(runs) < 8 and sum(runs) < min(measuring_s, MEASURING_S)):
        started = time.perf_counter()
        function()
        runs.append(time.perf_counter() - started)
    return min(runs[1:])


def _pass_s(forward: Forward, ids: NDArray[np.int64], measuring_s: float) -> float:
    """Seconds for one pass."""
    return shortest_run_s(lambda: forward(ids, None), measuring_s)


def _concurrent_passes_s(forward: Forward, ids: NDArray[np.int64], threads: int, measuring_s: float) -> float:
    """Seconds until each of so many threads has computed one pass."""
    with ThreadPoolExecutor(threads) as pool:
        return shortest_run_s(lambda: list(pool.map(lambda _: forward(ids, None), range(threads))), measuring_s)
