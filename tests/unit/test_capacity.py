"""How many processes keep a GPU busy."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.commands.capacity import TextTimes, processes_for_device, python_seconds

SECONDS = st.floats(1e-7, 1e-2)


@pytest.mark.parametrize(
    ("times", "cores", "processes", "texts_per_s", "is_full"),
    [
        (TextTimes(2e-6, 20e-6, 5e-6), 16, 4, 200_000, True),  # Python takes four times what the device takes
        (TextTimes(2e-6, 20e-6, 6e-6), 16, 4, 1 / 6e-6, True),  # a part of a process more is a process
        (TextTimes(30e-6, 10e-6, 10e-6), 16, 3, 100_000, True),  # the tokenizer is the slowest
        (TextTimes(2e-6, 5e-6, 50e-6), 16, 1, 20_000, True),  # a large model keeps the device busy by itself
        (TextTimes(2e-6, 20e-6, 2e-6), 4, 3, 150_000, False),  # ten could share the device, and four cores run three
        (TextTimes(20e-6, 20e-6, 2e-6), 1, 1, 50_000, False),  # one has to run, even if that is more than a core does
    ],
)
def test_so_many_processes(times: TextTimes, cores: int, processes: int, texts_per_s: float, is_full: bool) -> None:
    sharing = processes_for_device(times, cores)
    assert (sharing.processes, sharing.is_device_full) == (processes, is_full)
    assert sharing.texts_per_s == pytest.approx(texts_per_s)


@given(SECONDS, SECONDS, SECONDS, st.integers(1, 256))
def test_one_process_less_would_not_fill_the_device_and_more_is_not_promised_than_it_does(
    tokenize_s: float, python_s: float, device_s: float, cores: int
) -> None:
    times = TextTimes(tokenize_s, python_s, device_s)
    sharing = processes_for_device(times, cores)
    assert sharing.processes >= 1
    assert sharing.texts_per_s <= 1.001 / device_s
    assert sharing.texts_per_s <= 1.001 * sharing.processes / max(times)
    if sharing.processes > 1:
        assert (sharing.processes - 1) / max(times) < 1.001 / device_s
        assert sharing.processes * (tokenize_s + python_s) / max(times) <= 1.001 * cores
    assert processes_for_device(times, 2 * cores).processes >= sharing.processes


def test_the_time_in_python_is_measured() -> None:
    assert 0 < python_seconds(["хорошо", "плохо"] * 500) < 0.01
