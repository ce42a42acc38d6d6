"""Exactly-once beside at-least-once on a real Kafka: `python -m benchmarks.delivery TEXTS.csv [PART …]`.

Writes benchmarks/results/delivery.{json,md}; parts that are not asked for keep the figures that are there, if this very
machine's.

- model: events per second of a backlog through a model of the card's architecture; the two take turns.
- costless: the same with a model that costs nothing: what is left is the plumbing.
- latency: from publishing an event to reading its result, at a light load, with the card's architecture.
- partitions: backlog, latency at a steady load, memory and transactions of one process that owns so many partitions.
"""

import argparse
import asyncio
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, alive, event, machine, make_checkpoint, ratio, read_texts, write
from benchmarks.load import percentiles, publish_to_result_ms, resident_bytes
from tests.support.broker import Broker, start_broker
from tests.support.process import WorkerProcess, workers_in
from tests.support.topics import Kafka, Topics
from tests.support.waiting import wait_for

DELIVERIES = ("at-least-once", "exactly-once")
PARTS = ("model", "costless", "latency", "partitions")
PARTITIONS = (1, 6, 24, 96)
COSTLESS = "tests.support.costless_model"
CARD: dict[str, object] = {"backend": "torch", "max_batch_tokens": 1_024, "cpu_threads": 2}  # no time lost in tuning
LIGHT_RATE = 20
STEADY_RATE = 200
POLL_S = 0.05


def main() -> None:
    options = parsed_options()
    texts = read_texts(options.texts)
    path = RESULTS / "delivery.json"
    figures: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = make_checkpoint(folder / "card")
        broker = start_broker()
        try:
            here = machine(broker)
            if figures.get("machine", {}).get("cpu") != here["cpu"]:
                figures = {}
            figures["machine"] = here
            figures.pop("note", None)
            bench = Bench(broker, checkpoint, folder, texts, options.rounds)
            for part in options.parts or PARTS:
                figures[part] = getattr(bench, part)()
        finally:
            broker.close()
    write("delivery", figures, table(figures))


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="CSV file with a column text")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="times that the two take turns (default: 3)")
    return parser.parse_args()


class Bench:
    def __init__(self, broker: Broker, checkpoint: Path, folder: Path, texts: Sequence[str], rounds: int) -> None:
        self.kafka = Kafka(broker.bootstrap)
        self.checkpoint = checkpoint
        self.folder = folder
        self.texts = texts
        self.rounds = rounds

    def model(self) -> dict[str, Any]:
        return self._in_turns(2_000, "worker", **CARD)

    def costless(self) -> dict[str, Any]:
        return self._in_turns(200_000, COSTLESS)

    def latency(self) -> dict[str, Any]:
        return {
            "events_per_s": LIGHT_RATE,
            **{delivery: self._latency(delivery, 4, LIGHT_RATE, "worker", **CARD) for delivery in DELIVERIES},
        }

    def partitions(self) -> dict[str, Any]:
        return {
            str(count): {delivery: self._carried(delivery, count) for delivery in DELIVERIES} for count in PARTITIONS
        }

    def _in_turns(self, events: int, module: str, **settings: object) -> dict[str, Any]:
        """A worker at a time, started when its backlog is complete: it may be faster than who sends."""
        speeds: dict[str, list[float]] = {delivery: [] for delivery in DELIVERIES}
        for _ in range(self.rounds):
            for delivery in DELIVERIES:
                topics = Topics.unique()
                self.kafka.create_all(topics, 4)
                self._send(topics, events)
                with self._workers() as workers:
                    worker = workers.start(topics, module=module, delivery=delivery, cache_size=0, **settings)
                    speeds[delivery].append(speed(worker, events))
                    assert worker.terminate() == 0
            print({delivery: round(values[-1]) for delivery, values in speeds.items()}, flush=True)
        return {
            "events": events,
            "events_per_s": {delivery: [round(value) for value in values] for delivery, values in speeds.items()},
            "ratio": ratio(speeds["exactly-once"], speeds["at-least-once"]),
        }

    def _latency(
        self, delivery: str, partitions: int, rate: float, module: str, **settings: object
    ) -> dict[str, float]:
        topics = Topics.unique()
        self.kafka.create_all(topics, partitions)
        with self._workers() as workers:
            worker = workers.start(topics, module=module, delivery=delivery, cache_size=0).wait_until_assigned(
                partitions
            )
            cpu_s, began = cpu_seconds(worker), time.monotonic()
            times = asyncio.run(
                publish_to_result_ms(self.kafka.bootstrap, topics, self.texts, rate, int(rate * 15), "read_committed")
            )
            busy = (cpu_seconds(worker) - cpu_s) / (time.monotonic() - began)
            transactions = worker.metrics.get("stage_seconds_count", stage="commit")
            assert worker.terminate() == 0
        return {**percentiles(times), "cpu": round(busy, 3), "commits_per_s": round(transactions / 15, 1)}

    def _carried(self, delivery: str, partitions: int) -> dict[str, Any]:
        events = 50_000
        topics = Topics.unique()
        self.kafka.create_all(topics, partitions)
        with self._workers() as workers:
            self._send(topics, events)
            worker = workers.start(topics, module=COSTLESS, delivery=delivery, cache_size=0)
            figure = speed(worker, events)
            resident = resident_bytes(worker)
            assert worker.terminate() == 0
        steady = self._latency(delivery, partitions, STEADY_RATE, COSTLESS)
        figures = {"events_per_s": round(figure), "memory_mb": round(resident / 1e6), **steady}
        print(partitions, delivery, figures, flush=True)
        return figures

    def _workers(self) -> Any:
        return workers_in(self.kafka.bootstrap, self.checkpoint, self.folder)

    def _send(self, topics: Topics, events: int) -> None:
        self.kafka.send(topics.input, (event(number, self.texts[number % len(self.texts)]) for number in range(events)))


def speed(worker: WorkerProcess, events: int) -> float:
    """Events per second that count as done, from a tenth of them to the last."""
    begin = wait_for(lambda: alive(worker) and done(worker, events // 10), "the first tenth", 300, every=POLL_S)
    end = wait_for(lambda: done(worker, events), "all of it", 300, every=POLL_S)
    return (end[1] - begin[1]) / (end[0] - begin[0])


def done(worker: WorkerProcess, least: int) -> tuple[float, float] | None:
    """When, and how many; None as long as there are fewer."""
    counts = re.findall(r"^sentiment_worker_records_consumed_total{.*} (.*)$", worker.get("/metrics")[1], re.MULTILINE)
    count = sum(map(float, counts))
    return (time.monotonic(), count) if count >= least else None


def cpu_seconds(worker: WorkerProcess) -> float:
    ticks = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def table(figures: dict[str, Any]) -> str:
    rows = [
        f"Machine: {figures['machine']['cpu']}, {figures['machine']['cores']} cores. Load, worker and broker share them."
    ]
    if "note" in figures:
        rows += ["", f"Measured {figures['note']}."]
    asked = {"model": 0.8, "costless": 0.6}
    names = {"model": "a model of the card's architecture", "costless": "a model that costs nothing"}
    speeds = [part for part in asked if part in figures]
    if speeds:
        rows += ["", "Events per second of a backlog, 4 partitions, medians of rounds that take turns:", ""]
        rows += ["| with | at-least-once | exactly-once | ratio | asked |", "| --- | --- | --- | --- | --- |"]
        for part in speeds:
            least, exactly = (statistics.median(figures[part]["events_per_s"][name]) for name in DELIVERIES)
            rows.append(
                f"| {names[part]} | {least:.0f} | {exactly:.0f} | {figures[part]['ratio']['median']} | {asked[part]} |"
            )
    if "latency" in figures:
        rate = figures["latency"]["events_per_s"]
        rows += [
            "",
            f"From publishing to reading the result at {rate} events/s, the card's architecture, 4 partitions:",
            "",
        ]
        rows += ["| delivery | p50 ms | p95 ms | p99 ms |", "| --- | --- | --- | --- |"]
        for name in DELIVERIES:
            one = figures["latency"][name]
            rows.append(f"| {name} | {one['p50_ms']} | {one['p95_ms']} | {one['p99_ms']} |")
    if "partitions" in figures:
        rows += ["", "One process, a model that costs nothing; the latter four at a steady "
                 f"{STEADY_RATE} events/s over all partitions:", ""]  # fmt: skip
        rows += [
            "| partitions | delivery | backlog, events/s | memory, MB | p50 ms | p95 ms | commits/s | cores |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for count, both in figures["partitions"].items():
            for name in DELIVERIES:
                one = both[name]
                rows.append(
                    f"| {count} | {name} | {one['events_per_s']} | {one['memory_mb']} | {one['p50_ms']} | {one['p95_ms']} | "
                    f"{one['commits_per_s']} | {one['cpu']} |"
                )
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
