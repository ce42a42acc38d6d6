"""Latency under load, scaling and memory on a real Kafka: `python -m benchmarks.load TEXTS.csv`.

Writes benchmarks/results/load.{json,md}.

- latency: an open-loop load of unique texts at 10, 50 and 80 % of capacity, from publishing to reading the result; a model
  of the card's architecture. Capacity is what the worker does while it is offered more, event by event: load and broker
  take their share of the machine, as they do while latency is measured.
- scaling: one and two workers whose model takes a fixed time for each device batch, so that two cores do not hide it.
- memory: a worker with a model that costs nothing, after a tenth of the events and after all.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from benchmarks.common import alive, event, machine, make_checkpoint, ratio, read_texts, write
from benchmarks.worker import published, worker_speed
from tests.support.broker import Broker, start_broker
from tests.support.process import WorkerProcess, workers_in
from tests.support.topics import Kafka, Topics
from tests.support.waiting import wait_for

SHARES = (0.1, 0.5, 0.8)
TOO_MUCH = 1.5  # times what the worker does on a backlog
PASS_SECONDS = 0.05
SCALING_ROUNDS = 3
COSTLESS = "tests.support.costless_model"


def main() -> None:
    options = parsed_options()
    texts = read_texts(options.texts)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        broker = start_broker()
        try:
            figures = {
                "machine": machine(broker),
                "latency": latency(broker, make_checkpoint(folder / "card"), folder, texts, options.seconds),
                "scaling": scaling(broker, folder, texts),
                "memory": memory(broker, folder, options.events),
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
    _, capacity = offered(broker, checkpoint, folder, texts, backlog * TOO_MUCH, seconds)
    assert capacity < backlog * TOO_MUCH * 0.95, "it kept up: that is no capacity"
    loads = {}
    for share in SHARES:
        times, _ = offered(broker, checkpoint, folder, texts, capacity * share, seconds)
        loads[f"{share:.0%}"] = {"events_per_s": round(capacity * share), **percentiles(times)}
    return {"backlog_events_per_s": round(backlog), "capacity_events_per_s": round(capacity), "loads": loads}


def offered(
    broker: Broker, checkpoint: Path, folder: Path, texts: Sequence[str], rate: float, seconds: float
) -> tuple[list[float], float]:
    """A load of ``rate`` events/s: ms from publishing to reading of each result, and results/s while the load lasts."""
    kafka, topics = Kafka(broker.bootstrap), Topics.unique()
    kafka.create_all(topics, 4)
    with workers_in(broker.bootstrap, checkpoint, folder) as workers:
        worker = workers.start(topics, cache_size=0, cpu_threads="auto").wait_until_ready()
        began = time.time()
        times = asyncio.run(publish_to_result_ms(broker.bootstrap, topics, texts, rate, int(rate * seconds)))
        assert worker.terminate() == 0
    begin, end = began + seconds / 4, began + seconds
    return times, sum(begin <= moment < end for moment in published(kafka, topics)) / (end - begin)


def percentiles(times: Sequence[float]) -> dict[str, float]:
    ordered = sorted(times[len(times) // 10 :])
    return {f"p{share}_ms": round(ordered[int(len(ordered) * share / 100)], 1) for share in (50, 95, 99)}


async def publish_to_result_ms(
    bootstrap: str, topics: Topics, texts: Sequence[str], rate: float, events: int, isolation: str = "read_uncommitted"
) -> list[float]:
    """Open loop: an event sets out when it is due, whatever became of those before; time counts from when it was due."""
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap)
    consumer = AIOKafkaConsumer(
        topics.output, bootstrap_servers=bootstrap, auto_offset_reset="earliest", isolation_level=isolation
    )
    await producer.start()
    await consumer.start()
    due: list[float] = []
    times: list[float] = []

    async def receive() -> None:
        async for record in consumer:
            times.append((time.perf_counter() - due[int(json.loads(record.value)["id"])]) * 1000)
            if len(times) == events:
                return

    receiving = asyncio.create_task(receive())
    gaps = random.Random(1)
    at = time.perf_counter()
    for number in range(events):
        at += gaps.expovariate(rate)
        due.append(at)
        await asyncio.sleep(max(0.0, at - time.perf_counter()))
        sent = event(number, texts[number % len(texts)])
        await producer.send(topics.input, sent.value, key=sent.key)
    await asyncio.wait_for(receiving, 60)
    await consumer.stop()
    await producer.stop()
    return times


# Scaling.


def scaling(broker: Broker, folder: Path, texts: Sequence[str]) -> dict[str, Any]:
    """Events per second of one and of two workers in turn, each limited by a device batch of fixed cost."""
    speeds: dict[int, list[float]] = {1: [], 2: []}
    os.environ["PASS_SECONDS"] = str(PASS_SECONDS)
    try:
        for _ in range(SCALING_ROUNDS):
            for count, of_all_rounds in speeds.items():
                of_all_rounds.append(round(group_speed(broker, folder, texts, count), 1))
    finally:
        del os.environ["PASS_SECONDS"]
    return {"one": speeds[1], "two": speeds[2], "two / one": ratio(speeds[2], speeds[1])}


def group_speed(broker: Broker, folder: Path, texts: Sequence[str], count: int) -> float:
    kafka, topics = Kafka(broker.bootstrap), Topics.unique()
    kafka.create_all(topics, 4)
    with workers_in(broker.bootstrap, Path("builtin"), folder) as workers:
        group = [workers.start(topics, module=COSTLESS, cache_size=0, max_batch_texts=64) for _ in range(count)]
        for worker in group:
            worker.wait_until_ready()
        wait_for(lambda: sum(worker.metrics.get("assigned_partitions") for worker in group) == 4, "assignment")
        events = 6_000 * count
        kafka.send(topics.input, [event(number, texts[number % len(texts)]) for number in range(events)])
        begin = wait_for(lambda: counted(kafka, topics, events // 5), "a fifth of the results")
        end = wait_for(lambda: counted(kafka, topics, events * 9 // 10), "most of the results", 300)
        assert [worker.terminate() for worker in group] == [0] * count
    return (end[1] - begin[1]) / (end[0] - begin[0])


def counted(kafka: Kafka, topics: Topics, least: int) -> tuple[float, int] | None:
    """When, and how many results there are; None as long as there are fewer."""
    count = kafka.count(topics.output)
    return (time.monotonic(), count) if count >= least else None


# Memory.


def memory(broker: Broker, folder: Path, events: int) -> dict[str, float]:
    kafka, topics = Kafka(broker.bootstrap), Topics.unique()
    kafka.create_all(topics, 4)
    with workers_in(broker.bootstrap, Path("builtin"), folder) as workers:
        worker = workers.start(topics, module=COSTLESS).wait_until_ready()
        bytes_at = []
        sent = 0
        for goal in (events // 10, events):
            while sent < goal:
                step = min(50_000, goal - sent)
                kafka.send(topics.input, [event(number, f"текст {number}") for number in range(sent, sent + step)])
                sent += step
            wait_for(lambda goal=goal: alive(worker) and kafka.count(topics.output) >= goal, "all results", 600)  # type: ignore[misc]
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
        "Latency from publishing to reading the result, in ms, at shares of "
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
