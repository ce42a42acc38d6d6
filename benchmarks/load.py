"""Latency under load, scaling and memory on a real Kafka: `python -m benchmarks.load TEXTS.csv`.

Writes benchmarks/results/load.{json,md}.

- latency: an open-loop load of unique texts at 10, 50 and 80 % of capacity, from the moment when the broker has an event to
  the moment when it has the result, both by its clock; a model of the card's architecture. Capacity is what the worker does
  while it is offered more, event by event: load and broker take their share of the machine, as they do while latency is
  measured.
- scaling: one and two workers whose model takes a fixed time for each device batch, so that two cores do not hide it.
- memory: a worker with a model that costs nothing, after a tenth of the events and after all.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.broker_log import percentiles
from benchmarks.common import event, machine, make_checkpoint, ratio, read_texts, write
from benchmarks.load_generator import numbered
from benchmarks.testbed import new_testbed
from benchmarks.worker import worker_speed
from tests.support.broker import Broker, start_broker
from tests.support.process import WorkerProcess

PARTITIONS = 4
SHARES = (0.1, 0.5, 0.8)
TOO_MUCH = 1.5  # times what the worker does on a backlog
PASS_SECONDS = 0.05
SCALING_ROUNDS = 3
CACHE_SIZE = 65_536  # the default


def main() -> None:
    options = parsed_options()
    texts = read_texts(options.texts)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        broker = start_broker(controllable=True)
        try:
            figures = {
                "machine": machine(broker),
                "latency": latency(broker, make_checkpoint(folder / "card"), folder, texts, options.seconds),
                "scaling": scaling(broker, texts),
                "memory": memory(broker, options.events),
            }
        finally:
            broker.close()
    write("load", figures, table(figures))


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="CSV file with a column text")
    parser.add_argument("--seconds", type=float, default=20, help="of each load, s (default: 20)")
    parser.add_argument("--events", type=int, default=1_000_000, help="for memory (default: 1,000,000)")
    return parser.parse_args()


# Latency.


def latency(broker: Broker, checkpoint: Path, folder: Path, texts: Sequence[str], seconds: float) -> dict[str, Any]:
    backlog = worker_speed(broker, checkpoint, folder, texts[:5_000])
    _, capacity = offered(broker, checkpoint, texts, backlog * TOO_MUCH, seconds)
    assert capacity < backlog * TOO_MUCH * 0.95, "it kept up: that is no capacity"
    loads = {}
    for share in SHARES:
        times, _ = offered(broker, checkpoint, texts, capacity * share, seconds)
        loads[f"{share:.0%}"] = {"events_per_s": round(capacity * share), **percentiles(times)}
    return {"backlog_events_per_s": round(backlog), "capacity_events_per_s": round(capacity), "loads": loads}


def offered(
    broker: Broker, checkpoint: Path, texts: Sequence[str], rate: float, seconds: float
) -> tuple[list[int], float]:
    """A load of ``rate`` events/s: the wait of each event for its result, ms, and results/s while the load lasts."""
    with new_testbed(broker, PARTITIONS, checkpoint, "worker", cpu_threads="auto") as bed:
        worker = bed.start().wait_until_ready()
        found = bed.waits_under_load(rate, seconds, lambda number: event(number, texts[number % len(texts)]))
        assert worker.terminate() == 0
    return found


# Scaling.


def scaling(broker: Broker, texts: Sequence[str]) -> dict[str, Any]:
    """Events per second of one and of two workers in turn, each limited by a device batch of fixed cost."""
    speeds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(SCALING_ROUNDS):
        for count, of_all_rounds in speeds.items():
            of_all_rounds.append(round(group_speed(broker, texts, count), 1))
    return {"one": speeds[1], "two": speeds[2], "two / one": ratio(speeds[2], speeds[1])}


def group_speed(broker: Broker, texts: Sequence[str], count: int) -> float:
    with new_testbed(broker, PARTITIONS, max_batch_texts=64) as bed:
        group = [bed.start({"PASS_SECONDS": str(PASS_SECONDS)}) for _ in range(count)]
        bed.wait_until_shared(group)
        bed.publish(event(number, texts[number % len(texts)]) for number in range(6_000 * count))
        bed.wait_until_done()
        assert [worker.terminate() for worker in group] == [0] * count
        return bed.output().per_second()


# Memory.


def memory(broker: Broker, events: int) -> dict[str, float]:
    with new_testbed(broker, PARTITIONS, cache_size=CACHE_SIZE) as bed:
        worker = bed.start().wait_until_ready()
        bytes_at = []
        for begin, goal in ((0, events // 10), (events // 10, events)):
            bed.publish(map(numbered, range(begin, goal)))
            bed.wait_until_done(seconds=600)
            bytes_at.append(resident_bytes(worker))
        assert worker.terminate() == 0
    return {"events": events, "early_mb": round(bytes_at[0] / 1e6, 1), "late_mb": round(bytes_at[1] / 1e6, 1),
            "ratio": round(bytes_at[1] / bytes_at[0], 3)}  # fmt: skip


def resident_bytes(worker: WorkerProcess) -> float:
    return next(value for name, _, value in worker.metrics.samples if name == "process_resident_memory_bytes")


def table(figures: dict[str, Any]) -> str:
    latencies, scaled, kept = figures["latency"], figures["scaling"], figures["memory"]
    both = scaled["two / one"]
    one, two = (statistics.median(scaled[name]) for name in ("one", "two"))
    rows = [
        f"Machine: {figures['machine']['cpu']}, {figures['machine']['cores']} cores. Load, worker and broker share them.",
        "",
        "Latency from the broker's getting an event to its getting the result, in ms, at shares of "
        f"{latencies['capacity_events_per_s']} events/s, which is what it does while it is offered more "
        f"({latencies['backlog_events_per_s']} on a backlog, with no load beside it):",
        "",
        "| load | events/s | p50 | p95 | p99 |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {share} | {load['events_per_s']} | {load['p50_ms']} | {load['p95_ms']} | {load['p99_ms']} |"
            for share, load in latencies["loads"].items()
        ),
        "",
        "| what | figure |",
        "| --- | --- |",
        f"| one worker, {PASS_SECONDS * 1000:g} ms a device batch of 64, events/s | {one:,.0f} |",
        f"| two workers, events/s | {two:,.0f} |",
        f"| two / one, {SCALING_ROUNDS} rounds in turn | {both['median']} ({both['min']} to {both['max']}) |",
        f"| memory after {kept['events'] // 10:,} events, MB | {kept['early_mb']} |",
        f"| memory after {kept['events']:,} events, MB | {kept['late_mb']} |",
        f"| late / early | {kept['ratio']} |",
    ]
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
