"""What benchmarks/gpu.py makes of what it has measured."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.broker_log import per_second
from benchmarks.gpu_load import numbered
from benchmarks.gpu_table import asked_figures, table
from benchmarks.test_broker_log import FakeBatch, results

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_device.sh"
MACHINE = {"cpu": "a CPU", "cores": 16, "device": "a GPU", "torch": "2", "python": "3"}
EMPTY: dict[str, Any] = {
    "note": "A note.", "machine": MACHINE, "commit": "c", "day": "d", "is_rehearsal": False, "failed": {},
    "not_measured": {},
}  # fmt: skip
MEASURED = EMPTY | {
    "right": {
        "half": "float16",
        "against_float32": {
            "padded, float32": {"labels_that_agree_percent": 100.0, "largest_difference_of_a_logit": 0.0},
            "padded, float16": {"labels_that_agree_percent": 99.99, "largest_difference_of_a_logit": 0.1},
            "unpadded, float16": {"labels_that_agree_percent": 99.8, "largest_difference_of_a_logit": 0.2},
        },
    },
    "engine": {
        "ways": {
            way: {"medians": {"from ids": speed, "from text": 200_000}, "by_micro_batch": {"512": 1}}
            for way, speed in (("padded", 250_000), ("unpadded", 450_000))
        }
    },
    "one process, default settings": {"events_per_s": 50_000, "ready_s": [5.5]},
    "latency": {"50%": {"events_per_s": 25_000, "p50_ms": 20.0, "p95_ms": 30, "p99_ms": 61.0}, "took_s": 1},
    "exactly once": {"events": 10, "events_per_s": 1, "lost": 0, "twice": 1},
}


def test_figures_are_compared_with_what_was_asked() -> None:
    verdicts = {row.name.split(",")[0]: row.verdict for row in asked_figures(MEASURED)}
    assert verdicts == {
        "labels that agree in half precision": "no",  # of the worse way
        "engine from ids": "yes",  # of the better way
        "engine from text": "no",
        "one process": "not measured",  # the tuned one
        "four processes": "not measured",
        "latency at half of the default's speed": "no",
        "start to ready": "yes",
        "exactly once: lost or twice": "no",
    }
    assert {row.verdict for row in asked_figures(EMPTY)} == {"not measured"}


def test_a_rehearsal_is_compared_with_nothing() -> None:
    assert "| reached |" in table(MEASURED)
    rehearsal = table(MEASURED | {"is_rehearsal": True})
    assert "asked" not in rehearsal
    assert "H100" not in rehearsal
    assert rehearsal.startswith("A note.")


def test_what_was_not_measured_is_said() -> None:
    assert "Not measured: latency (no time)." in table(EMPTY | {"not_measured": {"latency": "no time"}})
    assert "Failed: right (it broke)." in table(EMPTY | {"failed": {"right": "it broke"}})


def test_speed_is_by_the_batches_that_the_broker_got_within_a_span() -> None:
    end = FakeBatch(5, 1_500, is_control_batch=True)
    one = [results(0, 900, 1, 2), results(2, 1_000, 3, 4, 5), end, results(6, 1_999, 6)]
    assert per_second([one, [results(0, 2_000, 9)]], 1_000, 2_000) == 4
    assert per_second([], 0, 1) == 0


@pytest.mark.parametrize("count", [3, 10])
def test_no_text_comes_twice(count: int) -> None:
    assert len({numbered(["а", "б", "в"], number) for number in range(count)}) == count


def test_each_package_of_the_bundle_is_locked() -> None:
    (names,) = re.findall(r'^PACKAGES="([^"]*)"', SCRIPT.read_text(), re.MULTILINE)
    locked = re.findall(r"^([\w-]+)==", (ROOT / "requirements" / "dev.txt").read_text(), re.MULTILINE)
    assert set(names.split()) <= set(locked)


@pytest.mark.parametrize(("words", "told"), [([], "say pack or run"), (["pack"], "a CSV file with a column text")])
def test_the_script_of_the_bundle_says_what_it_wants(words: list[str], told: str) -> None:
    done = subprocess.run([SCRIPT, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr
