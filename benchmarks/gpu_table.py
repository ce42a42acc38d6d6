"""What was asked of a GPU beside what was measured, and what had been measured before: the table of benchmarks/gpu.py."""

import json
import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.common import RESULTS

DEFAULT = "one process, default settings"
BEFORE = "commit 035239a on one H100 (gpu.json, gpu-kafka.json)"


class Asked(NamedTuple):
    """A figure: its name, where it is, what is asked, and what it was before, where that is known."""

    name: str
    measured: float | None
    asked: float
    is_least: bool
    before: float | None = None

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        return "yes" if (self.measured >= self.asked) == self.is_least or self.measured == self.asked else "no"


def asked_figures(figures: dict[str, Any]) -> list[Asked]:
    """All that is asked for. Where there are two ways to compute, the better one's figure counts."""
    old, old_kafka = read("gpu")["engine"]["texts_per_s"], read("gpu-kafka")["events_per_s"]
    ways = figures.get("engine", {}).get("ways", {}).values()
    half = [each["labels_that_agree_percent"] for name, each in figures.get("right", {}).get("against_float32", {}).items()
            if name.endswith(figures["right"]["half"])]  # fmt: skip
    latency = figures.get("latency", {}).get("50%", {})
    return [
        Asked("labels that agree in half precision, %", min(half, default=None), 99.9, True, 99.996),
        Asked("engine from ids, packing included, texts/s", best(ways, "from ids"), 400_000, True,
              statistics.median(old["from ids"])),
        Asked("engine from text, one process, texts/s", best(ways, "from text"), 300_000, True,
              statistics.median(old["from text"])),
        Asked("one process, default settings, events/s", speed(figures, DEFAULT), 50_000, True,
              old_kafka["one worker, default settings"]),
        Asked("one process, tuned, events/s", speed(figures, "one process, tuned"), 65_000, True,
              old_kafka["one worker, tuned"]),
        Asked("four processes, tuned, events/s", speed(figures, "four processes, tuned"), 220_000, True,
              old_kafka["four workers, tuned"]),
        Asked("latency at half of the default's speed, p50, ms", latency.get("p50_ms"), 20, False),
        Asked("latency at half of the default's speed, p99, ms", latency.get("p99_ms"), 60, False),
        Asked("start to ready, dtype=auto, s", max(figures.get(DEFAULT, {}).get("ready_s", []), default=None), 6, False),
        Asked("exactly once: lost or twice", lost_or_twice(figures), 0, False),
    ]  # fmt: skip


def best(ways: Any, what: str) -> float | None:
    return max((way["medians"][what] for way in ways), default=None)


def speed(figures: dict[str, Any], case: str) -> float | None:
    found: float | None = figures.get(case, {}).get("events_per_s")
    return found


def lost_or_twice(figures: dict[str, Any]) -> float | None:
    found = figures.get("exactly once")
    return None if found is None else found["lost"] + found["twice"]


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(figures: dict[str, Any]) -> str:
    here = figures["machine"]
    lines = [
        f"{figures['note']}",
        "",
        f"Machine: {here['cpu']}, {here['cores']} cores; {here['device']}; torch {here['torch']}, Python {here['python']}. "
        f"Commit {figures['commit']}, {figures['day']}.",
    ]
    if not figures["is_rehearsal"]:
        lines += [
            "",
            f"Before: {BEFORE}.",
            "",
            "| what | measured | asked | reached | before |",
            "| --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {row.name} | {shown(row.measured)} | {'≥' if row.is_least else '≤'} {row.asked:,} | {row.verdict} | "
            f"{shown(row.before)} |"
            for row in asked_figures(figures)
        ]
    lines += ["", "| figure | measured |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in details(figures)]
    for reason in ("not_measured", "failed"):
        lines += [
            f"\n{reason.replace('_', ' ').capitalize()}: {name} ({why})." for name, why in figures[reason].items()
        ]
    return "\n".join(lines) + "\n"


def details(figures: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, each in figures.get("right", {}).get("against_float32", {}).items():
        agree, differ = each["labels_that_agree_percent"], each["largest_difference_of_a_logit"]
        yield f"{name} against float32", f"{agree} % of labels agree, logits differ by {differ:.1e} at most"
    for way, each in figures.get("engine", {}).get("ways", {}).items():
        for name, value in each["medians"].items():
            yield f"engine, {way}, {name}, texts/s", f"{value:,}"
        yield f"engine, {way}, texts/s by micro-batch", sizes(each["by_micro_batch"])
    for name, each in figures.items():
        if isinstance(each, dict) and "events_per_s" in each:
            ready = f"; ready after {max(each['ready_s'])} s" if each.get("ready_s") else ""
            yield f"{name}, events/s", f"{each['events_per_s']:,}{ready}"
    for share, each in figures.get("latency", {}).items():
        if isinstance(each, dict):
            yield (
                f"latency at {share} ({each['events_per_s']:,} events/s)",
                f"p50 {each['p50_ms']} ms, p95 {each['p95_ms']} ms, p99 {each['p99_ms']} ms",
            )
    for name, value in figures.get("peers", {}).get("texts_per_s", {}).items():
        yield f"{name}, texts/s", f"{value:,}"


def sizes(by_size: dict[str, int]) -> str:
    return ", ".join(f"{int(size):,}: {value:,}" for size, value in by_size.items())


def shown(value: float | None) -> str:
    return "" if value is None else f"{value:,}"
