"""The worker beside its peers on a real Kafka: `python -m benchmarks.end_to_end TEXTS.csv`.

Writes benchmarks/results/end_to_end.{json,md}. Each reads the same backlog of unique texts from 4 partitions, in a
process of its own; in each round all take turns, in another order each time. Ratios are medians over the rounds.

- model: a randomly initialised model of the card's architecture; the peers with transformers by the book (hf) and with
  this project's own model class (ours), called with the smallest batch of 512 texts or more that is about as fast as any.
- plumbing: a model that costs nothing; batches of 2,000 for the peers and of 1,024 for the worker.

All are measured from outside and in the same way: the ends of the output topic's partitions, asked every 50 ms. Speed is the
slope from the first sample with a tenth of the results to the first with nine tenths; CPU is what the process used between
the same two. So neither start nor loading counts, nor what a pipeline has finished beforehand: it is as full at both ends.
The model's backend, threads and token budget are the same for all: what it measures at its own start differs by chance.
The worker's cache is off (cache_size=0, not the default): all texts are unique, so it would answer none.

Afterwards every event must have its result, under its own key. A case with 0 events keeps the figures that are there, which
the table then says.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from confluent_kafka.admin import OffsetSpec

from benchmarks.common import (
    RESULTS,
    WINDOW,
    Process,
    alive,
    code,
    event,
    machine,
    make_checkpoint,
    ratio,
    read_texts,
    write,
)
from tests.support.broker import Broker, start_broker
from tests.support.process import WorkerProcess, environment
from tests.support.topics import Kafka, Record, Topics
from worker.commands.load_model import prepare_process
from worker.model.autotune import smallest_at_full_speed
from worker.model.sentiment_model import SentimentModel

PARTITIONS = 4
INTERVAL_S = 0.05
DEADLINE_S = 900
TICKS = os.sysconf("SC_CLK_TCK")
VERSIONS = ("faststream", "quixstreams", "confluent-kafka", "aiokafka", "torch", "transformers")
BATCHES_KEY = "texts/s of our model class by batch"
BATCHES = (512, 1_024, 2_048, 4_096)  # fewer texts cost them more of Kafka's requests
BATCH_TURNS = 3
PLUMBING_BATCH = 2_000
PLUMBING_WINDOW = 1_024

Start = Callable[[Path, str, Topics], Process]
"""Folder for its output, bootstrap, topics → the running process."""


class Speed(NamedTuple):
    events_per_s: float
    cpu_s_per_1000: float


@dataclass(frozen=True)
class Case:
    """What takes turns over the same events; the first is the worker."""

    name: str
    records: Sequence[Record]
    contestants: dict[str, Start]


def main() -> None:
    options = parsed_options()
    texts = read_texts(options.texts)
    path = RESULTS / "end_to_end.json"
    before: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"cases": {}}
    with tempfile.TemporaryDirectory() as name, closing(start_broker()) as broker:
        folder = Path(name)
        checkpoint = make_checkpoint(folder / "card")
        engine = {name: getattr(options, name) for name in ("backend", "cpu_threads", "max_batch_tokens")}
        batches = best_batch(checkpoint, texts, engine) if options.events else before.get(BATCHES_KEY, {})
        batch = smallest_at_full_speed(batches) if options.events else WINDOW
        cases = [
            model_case(checkpoint, texts, options.events, engine, batch),
            plumbing_case(texts, options.plumbing_events),
        ]
        figures = {
            "machine": {**machine(broker), "versions": versions()},
            "engine": engine,
            BATCHES_KEY: batches,
            "code": code(),
            "cases": {
                case.name: {"code": code(), **compare(case, broker, folder, options.rounds)}
                if case.records
                else before["cases"][case.name]
                for case in cases
                if case.records or case.name in before["cases"]
            },
        }
    write("end_to_end", figures, table(figures))


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="CSV file with a column text")
    parser.add_argument("--events", type=int, default=20_000, help="events with a model; 0: none (default: 20000)")
    parser.add_argument("--plumbing-events", type=int, default=200_000, help="without; 0: none (default: 200000)")
    parser.add_argument("--rounds", type=int, default=5, help="times that all take turns (default: 5)")
    parser.add_argument("--backend", choices=("torch", "onnx"), default="torch", help="(default: torch)")
    parser.add_argument("--cpu-threads", type=int, default=os.cpu_count(), help="(default: the cores)")
    parser.add_argument("--max-batch-tokens", type=int, default=1024, help="(default: 1024)")
    return parser.parse_args()


# Who takes part.


def model_case(checkpoint: Path, texts: Sequence[str], events: int, engine: dict[str, Any], batch: int) -> Case:
    contestants = {
        "worker": worker("worker", model=checkpoint, **engine),
        "faststream + hf": peer("faststream", "hf", WINDOW, model=checkpoint, **engine),
        "quix + hf": peer("quix", "hf", WINDOW, model=checkpoint, **engine),
        "faststream + ours": peer("faststream", "ours", batch, model=checkpoint, **engine),
        "quix + ours": peer("quix", "ours", batch, model=checkpoint, **engine),
    }
    return Case("model", records(texts, events), contestants)


def best_batch(checkpoint: Path, texts: Sequence[str], engine: dict[str, Any]) -> dict[int, float]:
    """Texts a second of our model class by the texts of a call: medians over turns."""
    prepare_process()
    model = SentimentModel.load(str(checkpoint), **engine)
    sample = texts[: max(BATCHES)]
    speeds: dict[int, list[float]] = {size: [] for size in BATCHES}
    for _ in range(BATCH_TURNS):
        for size, measured_so_far in speeds.items():
            started = time.perf_counter()
            for begin in range(0, len(sample), size):
                model.score(sample[begin : begin + size])
            measured_so_far.append(len(sample) / (time.perf_counter() - started))
    return {size: round(statistics.median(turns), 1) for size, turns in speeds.items()}


def plumbing_case(texts: Sequence[str], events: int) -> Case:
    contestants = {
        "worker": worker("tests.support.costless_model", PLUMBING_WINDOW),
        "faststream": peer("faststream", "costless", PLUMBING_BATCH),
        "quix": peer("quix", "costless", PLUMBING_BATCH),
    }
    return Case("plumbing", records(texts, events), contestants)


def records(texts: Sequence[str], events: int) -> list[Record]:
    """So many events, no text twice: from the second time on a text has a number."""
    rounds = (divmod(number, len(texts)) for number in range(events))
    return [event(number, texts[at] + (f" {times}" if times else "")) for number, (times, at) in enumerate(rounds)]


def worker(
    module: str, window: int = WINDOW, *, variables: Mapping[str, str] | None = None, **settings: object
) -> Start:
    def start(folder: Path, bootstrap: str, topics: Topics) -> Process:
        return WorkerProcess(
            folder,
            module,
            variables,
            bootstrap_servers=bootstrap,
            input_topics=topics.input,
            output_topic=topics.output,
            dead_letter_topic=topics.dead_letters,
            group_id=topics.group,
            **{"cache_size": 0, "max_batch_texts": window, **settings},
        )

    return start


def peer(name: str, engine: str, batch: int, **more: object) -> Start:
    def start(folder: Path, bootstrap: str, topics: Topics) -> Process:
        flags = {"engine": engine, "bootstrap": bootstrap, "input": topics.input, "output": topics.output}
        return PeerProcess(folder, name, {**flags, "group": topics.group, "batch": batch, **more})

    return start


class PeerProcess:
    """`python -m benchmarks.peers` with these flags; prints into a file in `folder`."""

    def __init__(self, folder: Path, name: str, flags: dict[str, object]) -> None:
        words = [word for flag, value in flags.items() for word in (f"--{flag.replace('_', '-')}", str(value))]
        self._output = folder / f"{flags['group']}.out"
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.peers", name, *words],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment(), cwd=folder,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    @property
    def output(self) -> str:
        return self._output.read_text(errors="replace")

    def terminate(self, seconds: float = 60) -> int:
        self._process.terminate()
        return self._process.wait(seconds)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


# Measuring.


def compare(case: Case, broker: Broker, folder: Path, rounds: int) -> dict[str, Any]:
    """Speeds and CPU of each by round, and the worker's over each peer's."""
    turns = {name: partial(measured, start, broker, folder, case.records) for name, start in case.contestants.items()}
    return summary(take_turns(turns, rounds), len(case.records), rounds)


def take_turns(turns: Mapping[str, Callable[[], Speed]], rounds: int) -> dict[str, list[Speed]]:
    """Calls each once a round, in another order each time."""
    speeds: dict[str, list[Speed]] = {name: [] for name in turns}
    for turn in range(rounds):
        for name in random.Random(turn).sample(list(turns), len(turns)):
            speeds[name].append(turns[name]())
            print(turn + 1, name, *(round(value, 4) for value in speeds[name][-1]), flush=True)
    return speeds


def summary(speeds: dict[str, list[Speed]], events: int, rounds: int) -> dict[str, Any]:
    own, *peers = speeds
    return {
        "events": events,
        "rounds": rounds,
        **by_name(speeds),
        "speed, worker / peer": {peer: ratio(column(speeds[own], 0), column(speeds[peer], 0)) for peer in peers},
        "CPU, worker / peer": {peer: ratio(column(speeds[own], 1), column(speeds[peer], 1)) for peer in peers},
    }


def by_name(speeds: dict[str, list[Speed]]) -> dict[str, Any]:
    return {
        "events_per_s": {name: [round(turn.events_per_s, 1) for turn in turns] for name, turns in speeds.items()},
        "cpu_s_per_1000": {name: [round(turn.cpu_s_per_1000, 4) for turn in turns] for name, turns in speeds.items()},
    }


def column(turns: Sequence[Speed], which: int) -> list[float]:
    return [turn[which] for turn in turns]


def id_in_json(value: bytes) -> str:
    return str(json.loads(value)["id"])


def measured(
    start: Start, broker: Broker, folder: Path, sent: Sequence[Record], id_in: Callable[[bytes], str] = id_in_json
) -> Speed:
    """One turn on topics of its own; AssertionError if an event has no result under its key. `id_in` reads a result."""
    kafka, topics = Kafka(broker.bootstrap), Topics.unique()
    kafka.create_all(topics, PARTITIONS)
    kafka.send(topics.input, sent)
    with running(start(folder, broker.bootstrap, topics)) as process:
        speed = slope(process, Ends(kafka, topics.output), len(sent))
        process.terminate()
    found = {(record.key, id_in(record.value or b"")) for record in kafka.read(topics.output)}
    expected = {(record.key, (record.key or b"").decode()) for record in sent}
    assert found == expected, f"{len(expected - found)} results are missing, {len(found - expected)} are not due"
    for name in (topics.input, topics.output, topics.dead_letters):
        kafka.delete(name)
    return speed


@contextmanager
def running(process: Any) -> Iterator[Any]:
    """Ends the process, whatever becomes of the turn."""
    try:
        yield process
    finally:
        if process.is_running:
            process.kill()


class Ends:
    """The ends of a topic's partitions, with one request each time."""

    def __init__(self, kafka: Kafka, topic: str) -> None:
        self._admin = kafka.admin
        self._asked = {place: OffsetSpec.latest() for place in kafka.partitions(topic)}

    def count(self) -> int:
        """Records ever published to the topic."""
        return sum(answer.result(30).offset for answer in self._admin.list_offsets(self._asked).values())


def slope(process: Process, ends: Ends, events: int) -> Speed:
    """Blocks until all results are there; AssertionError if the process ends or takes too long."""
    first = sample_at(process, ends, events // 10)
    last = sample_at(process, ends, events * 9 // 10)
    sample_at(process, ends, events)
    results = last.results - first.results
    return Speed(results / (last.at - first.at), 1000 * (last.cpu_s - first.cpu_s) / results)


class Sample(NamedTuple):
    at: float
    results: int
    cpu_s: float


def sample_at(process: Process, ends: Ends, results: int) -> Sample:
    """The first sample with so many results."""
    deadline = time.monotonic() + DEADLINE_S
    while (count := ends.count()) < results:
        assert alive(process)
        assert time.monotonic() < deadline, f"{count} of {results} results:\n{process.output[-2000:]}"
        time.sleep(INTERVAL_S)
    return Sample(time.monotonic(), count, cpu_seconds(process.pid))


def cpu_seconds(pid: int) -> float:
    """What all threads of a process have used so far, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


# The rest.


def versions() -> dict[str, str]:
    return {name: version(name) for name in VERSIONS}


def table(figures: dict[str, Any]) -> str:
    machine = figures["machine"]
    listed = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    head = (
        f"Machine: {machine['cpu']}, {machine['cores']} cores, which the broker shares. {listed}. "
        "Medians of rounds in turn; in brackets minimum and maximum."
    )
    batches = {int(size): speed for size, speed in figures[BATCHES_KEY].items()}
    if batches:
        tried = ", ".join(f"{size}: {speed:,.0f}" for size, speed in batches.items())
        batch = smallest_at_full_speed(batches)
        head += f" Peers call our model class with {batch} texts (texts/s by their number: {tried})."
    lines = [head]
    for name, case in figures["cases"].items():
        lines += rows(name, case, is_older=case["code"] != figures["code"])
    return "\n".join(lines) + "\n"


def rows(name: str, case: dict[str, Any], *, is_older: bool) -> list[str]:
    age = " (of an earlier version)" if is_older else ""
    return [
        "",
        f"{name}, {case['events']:,} events, {case['rounds']} rounds{age}",
        "",
        "| what | events/s | CPU s per 1,000 events | speed, worker / peer | CPU, worker / peer |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {who} | {statistics.median(speeds):,.0f} | {statistics.median(case['cpu_s_per_1000'][who]):.3f} "
            f"| {shown(case['speed, worker / peer'].get(who))} | {shown(case['CPU, worker / peer'].get(who))} |"
            for who, speeds in case["events_per_s"].items()
        ),
    ]


def shown(value: dict[str, float] | None) -> str:
    return f"{value['median']:.2f} ({value['min']:.2f} to {value['max']:.2f})" if value else "–"


if __name__ == "__main__":
    main()
