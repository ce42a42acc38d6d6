"""Exactly-once beside at-least-once on a real Kafka: `python -m benchmarks.delivery TEXTS.csv [PART …]`.

Writes benchmarks/results/delivery.{json,md}; parts that are not asked for keep the figures that are there, if this very
machine's. What many partitions cost is measured by benchmarks/scale.py.

- model: events per second of a backlog through a model of the card's architecture; the two take turns.
- costless: the same with a model that costs nothing: what is left is the plumbing.
- latency: at a light load, from the moment when the broker has an event to the moment when a reader with read_committed can
  get its result, both by the broker's clock; with the card's architecture.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from benchmarks.broker_log import percentiles
from benchmarks.common import RESULTS, event, machine, make_checkpoint, ratio, read_texts, write
from benchmarks.testbed import Testbed, new_testbed
from tests.support.broker import Broker, start_broker
from tests.support.process import COSTLESS
from tests.support.topics import Record

DELIVERIES = ("at-least-once", "exactly-once")
PARTS = ("model", "costless", "latency")
PARTITIONS = 4
CARD: dict[str, object] = {"backend": "torch", "max_batch_tokens": 1_024, "cpu_threads": 2}  # no time lost in tuning
LIGHT_RATE = 20
LIGHT_SECONDS = 20


def main() -> None:
    options = parsed_options()
    texts = read_texts(options.texts)
    path = RESULTS / "delivery.json"
    figures: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        checkpoint = make_checkpoint(Path(name) / "card")
        broker = start_broker(controllable=True)
        try:
            here = machine(broker)
            if figures.get("machine", {}).get("cpu") != here["cpu"]:
                figures = {}
            figures["machine"] = here
            bench = Bench(broker, checkpoint, texts, options.rounds)
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
    def __init__(self, broker: Broker, checkpoint: Path, texts: Sequence[str], rounds: int) -> None:
        self.broker = broker
        self.checkpoint = checkpoint
        self.texts = texts
        self.rounds = rounds

    def model(self) -> dict[str, Any]:
        return self._in_turns(2_000, "worker", **CARD)

    def costless(self) -> dict[str, Any]:
        return self._in_turns(200_000, COSTLESS)

    def latency(self) -> dict[str, Any]:
        return {"events_per_s": LIGHT_RATE, **{delivery: self._latency(delivery) for delivery in DELIVERIES}}

    def _in_turns(self, events: int, module: str, **settings: object) -> dict[str, Any]:
        """A worker at a time, started when its backlog is complete: it may be faster than who sends."""
        speeds: dict[str, list[float]] = {delivery: [] for delivery in DELIVERIES}
        for _ in range(self.rounds):
            for delivery in DELIVERIES:
                with self._testbed(module, delivery=delivery, **settings) as bed:
                    bed.publish(map(self._event, range(events)))
                    worker = bed.start()
                    bed.wait_until_done()
                    assert worker.terminate() == 0
                    speeds[delivery].append(bed.output().per_second())
            print({delivery: round(values[-1]) for delivery, values in speeds.items()}, flush=True)
        return {
            "events": events,
            "events_per_s": {delivery: [round(value) for value in values] for delivery, values in speeds.items()},
            "ratio": ratio(speeds["exactly-once"], speeds["at-least-once"]),
        }

    def _latency(self, delivery: str) -> dict[str, float]:
        with self._testbed("worker", delivery=delivery, **CARD) as bed:
            worker = bed.start().wait_until_assigned(PARTITIONS)
            times, _ = bed.waits_under_load(LIGHT_RATE, LIGHT_SECONDS, self._event)
            assert worker.terminate() == 0
        return percentiles(times)

    def _testbed(self, module: str, **settings: object) -> AbstractContextManager[Testbed]:
        return new_testbed(self.broker, PARTITIONS, self.checkpoint, module, **settings)

    def _event(self, number: int) -> Record:
        return event(number, self.texts[number % len(self.texts)])


def table(figures: dict[str, Any]) -> str:
    rows = [
        f"Machine: {figures['machine']['cpu']}, {figures['machine']['cores']} cores. Load, worker and broker share them."
    ]
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
            f"From publishing to the readable result at {rate} events/s, the card's architecture, 4 partitions:",
            "",
        ]
        rows += ["| delivery | p50 ms | p95 ms | p99 ms |", "| --- | --- | --- | --- |"]
        for name in DELIVERIES:
            one = figures["latency"][name]
            rows.append(f"| {name} | {one['p50_ms']} | {one['p95_ms']} | {one['p99_ms']} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
