"""The README stays short, and its figures are those that were measured. tests/test_documents.py has the other ties."""

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
WORDS = " ".join(README.split())
RESULTS = ROOT / "benchmarks" / "results"


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def medians(case: str) -> dict[str, str]:
    """Events/s by who, from Kafka to Kafka on a CPU."""
    speeds = read("end_to_end")["cases"][case]["events_per_s"]
    return {who: f"{statistics.median(values):,.0f}" for who, values in speeds.items()}


def measured() -> dict[str, list[str]]:
    """Figures by the beginning of their row in the README."""
    model, plumbing, gpu = medians("model"), medians("plumbing"), read("gpu-kafka")["events_per_s"]
    return {
        "2 CPU cores, shared with the broker": [model["worker"], model["faststream + hf"], model["quix + hf"]],
        "the same": [model["worker"], model["faststream + ours"], model["quix + ours"]],
        "the same, and a model that costs nothing": [plumbing["worker"], plumbing["faststream"], plumbing["quix"]],
        "one H100, one process, 512 texts in a micro-batch": [f"{gpu['one worker, default settings']:,}"],
        "one H100, one process, [tuned](benchmarks/results/gpu-kafka.md)": [f"{gpu['one worker, tuned']:,}"],
        "one H100, four processes, tuned": [f"{gpu['four workers, tuned']:,}"],
    }


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize(("row", "figures"), measured().items(), ids=measured())
def test_a_figure_is_what_was_measured(row: str, figures: list[str]) -> None:
    (line,) = (line for line in README.splitlines() if line.startswith(f"| {row} |"))
    shown = re.findall(r"\b\d[\d,]*\b", line.removeprefix(f"| {row} |").replace("batches of 32", ""))
    assert [figure.strip(",") for figure in shown] == figures


def test_figures_of_the_gpu_without_kafka_are_what_was_measured() -> None:
    engine = statistics.median(read("gpu")["engine"]["texts_per_s"]["from text"])
    pipeline = max(speed for way, speed in read("gpu-engine")["texts_per_s_of_others"].items() if "pipeline" in way)
    assert f"{engine:,} texts per second" in WORDS
    assert f"[{pipeline:,} with transformers' pipeline]" in WORDS
