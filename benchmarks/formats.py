"""The worker with JSON and with Avro, in and out, on a real Kafka: `python -m benchmarks.formats TEXTS.csv`.

Writes benchmarks/results/formats.{json,md}. A model that costs nothing, so that reading and writing is all there is; unique
texts, and no cache. All take turns, in another order each time; speed and CPU are measured as `benchmarks.end_to_end` does.
Ratios are medians over the rounds. The schema registry is one of the tests, in this process: a worker asks it once.
"""

import argparse
import asyncio
import io
import json
import random
import statistics
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import fastavro

from benchmarks.common import machine, ratio, read_texts, write
from benchmarks.end_to_end import PARTITIONS, PLUMBING_WINDOW, Ends, Speed, Start, records, running, slope, worker
from tests.support.broker import Broker, start_broker
from tests.support.fake_registry import FakeRegistry, fake_registry
from tests.support.topics import Kafka, Record, Topics
from worker.core.schemas import result_avro_schema

EVENT = {
    "type": "record",
    "name": "Event",
    "fields": [{"name": "id", "type": "long"}, {"name": "text", "type": "string"}],
}
FORMATS = ("json", "avro")
FRAME_BYTES = 5


def main() -> None:
    options = parsed_options()
    in_json = records(read_texts(options.texts), options.events)
    speeds: dict[str, list[Speed]] = {}
    with tempfile.TemporaryDirectory() as name, closing(start_broker()) as broker, registry() as fake:
        sent = {"json": in_json, "avro": in_avro(in_json, fake.add(1_000, EVENT))}
        cases = [(given, made) for given in options.inputs for made in FORMATS]
        for turn in range(options.rounds):
            for given, made in random.Random(turn).sample(cases, len(cases)):
                start = contestant(given, made, fake.url)
                speed = measured(start, broker, Path(name), sent[given], made)
                speeds.setdefault(f"{given} to {made}", []).append(speed)
                print(turn + 1, given, made, *(round(value, 4) for value in speed), flush=True)
        figures = {"machine": machine(broker), "events": options.events, **summary(speeds)}
    write("formats", figures, table(figures))


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="CSV file with a column text")
    parser.add_argument("--events", type=int, default=200_000, help="of each turn (default: 200000)")
    parser.add_argument("--rounds", type=int, default=5, help="times that all take turns (default: 5)")
    parser.add_argument("--inputs", nargs="+", choices=FORMATS, default=FORMATS, help="formats to read (default: both)")
    return parser.parse_args()


def contestant(given: str, made: str, registry_url: str) -> Start:
    formats = {"input_format": given, "output_format": made}
    asked = {"schema_registry_url": registry_url} if "avro" in formats.values() else {}
    return worker("tests.support.costless_model", PLUMBING_WINDOW, **formats, **asked)


@contextmanager
def registry() -> Iterator[FakeRegistry]:
    """A schema registry that answers on a thread of its own."""
    found: list[FakeRegistry] = []
    is_there, is_over = threading.Event(), threading.Event()

    async def serve() -> None:
        async with fake_registry() as fake:
            found.append(fake)
            is_there.set()
            await asyncio.to_thread(is_over.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    is_there.wait()
    try:
        yield found[0]
    finally:
        is_over.set()
        thread.join()


def in_avro(events: Sequence[Record], frame: bytes) -> list[Record]:
    """The same events, as Confluent's serializers write them."""
    schema, written = fastavro.parse_schema(EVENT), []
    for event in events:
        stream = io.BytesIO()
        fastavro.schemaless_writer(stream, schema, json.loads(event.value or b""))
        written.append(Record(frame + stream.getvalue(), event.key))
    return written


def measured(start: Start, broker: Broker, folder: Path, sent: Sequence[Record], made: str) -> Speed:
    """One turn on topics of its own; AssertionError if an event has no result under its key."""
    kafka, topics = Kafka(broker.bootstrap), Topics.unique()
    kafka.create_all(topics, PARTITIONS)
    kafka.send(topics.input, sent)
    with running(start(folder, broker.bootstrap, topics)) as process:
        speed = slope(process, Ends(kafka, topics.output), len(sent))
        process.terminate()
    ids = ids_in_avro if made == "avro" else ids_in_json
    assert ids(kafka.read(topics.output)) == {(record.key, (record.key or b"").decode()) for record in sent}
    for name in (topics.input, topics.output, topics.dead_letters):
        kafka.delete(name)
    return speed


def ids_in_json(results: Sequence[Record]) -> set[tuple[bytes | None, str]]:
    return {(record.key, json.loads(record.value or b"")["id"]) for record in results}


def ids_in_avro(results: Sequence[Record]) -> set[tuple[bytes | None, str]]:
    schema, ids = fastavro.parse_schema(result_avro_schema()), set()
    for record in results:
        fields: Any = fastavro.schemaless_reader(io.BytesIO((record.value or b"")[FRAME_BYTES:]), schema, None)
        ids.add((record.key, fields["id"]))
    return ids


def summary(speeds: dict[str, list[Speed]]) -> dict[str, Any]:
    base = next(iter(name for name in speeds if name == "json to json"), min(speeds))
    per_s = {name: [turn.events_per_s for turn in turns] for name, turns in speeds.items()}
    return {
        "rounds": len(speeds[base]),
        "events_per_s": {name: [round(value, 1) for value in values] for name, values in per_s.items()},
        "cpu_s_per_1000": {name: [round(turn.cpu_s_per_1000, 4) for turn in turns] for name, turns in speeds.items()},
        f"speed / {base}": {name: ratio(values, per_s[base]) for name, values in per_s.items() if name != base},
    }


def table(figures: dict[str, Any]) -> str:
    machine = figures["machine"]
    ((base, ratios),) = ((key, value) for key, value in figures.items() if key.startswith("speed / "))
    lines = [
        f"Machine: {machine['cpu']}, {machine['cores']} cores, which the broker shares. {figures['events']:,} events, "
        f"medians of {figures['rounds']} rounds in turn; in brackets minimum and maximum.",
        "",
        f"| input to output | events/s | CPU s per 1,000 events | {base} |",
        "| --- | --- | --- | --- |",
    ]
    for name in sorted(figures["events_per_s"], reverse=True):
        speed, cpu = (statistics.median(figures[key][name]) for key in ("events_per_s", "cpu_s_per_1000"))
        share = ratios.get(name)
        shown = f"{share['median']:.2f} ({share['min']:.2f} to {share['max']:.2f})" if share else "–"
        lines.append(f"| {name} | {speed:,.0f} | {cpu:.4f} | {shown} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
