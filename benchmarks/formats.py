"""The worker with JSON and with Avro, in and out, on a real Kafka: `python -m benchmarks.formats TEXTS.csv`.

Writes benchmarks/results/formats.{json,md}. A model that costs nothing, so that reading and writing is all there is; unique
texts, and no cache. All take turns, in another order each time; speed and CPU are measured as `benchmarks.end_to_end` does.
Ratios are medians over the rounds. The schema registry is one of the tests, in this process: a worker asks it once.
"""

import argparse
import asyncio
import io
import json
import statistics
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import fastavro

from benchmarks.common import machine, ratio, read_texts, write
from benchmarks.end_to_end import (
    PLUMBING_WINDOW,
    Speed,
    Start,
    by_name,
    column,
    id_in_json,
    measured,
    records,
    shown,
    take_turns,
    worker,
)
from tests.support.broker import start_broker
from tests.support.fake_registry import FakeRegistry, fake_registry
from tests.support.topics import Record
from worker.core.framing import FRAME_BYTES
from worker.core.schemas import result_avro_schema

EVENT = {
    "type": "record",
    "name": "Event",
    "fields": [{"name": "id", "type": "long"}, {"name": "text", "type": "string"}],
}
RESULT = fastavro.parse_schema(result_avro_schema())


def id_in_avro(value: bytes) -> str:
    fields: Any = fastavro.schemaless_reader(io.BytesIO(value[FRAME_BYTES:]), RESULT, None)
    return str(fields["id"])


FORMATS = {"json": id_in_json, "avro": id_in_avro}


def main() -> None:
    options = parsed_options()
    in_json = records(read_texts(options.texts), options.events)
    with tempfile.TemporaryDirectory() as name, closing(start_broker()) as broker, registry() as fake:
        sent = {"json": in_json, "avro": in_avro(in_json, fake.add(1_000, EVENT))}
        turns = {
            f"{given} to {made}": partial(
                measured, contestant(given, made, fake.url), broker, Path(name), sent[given], FORMATS[made]
            )
            for given in options.inputs
            for made in FORMATS
        }
        speeds = take_turns(turns, options.rounds)
        figures = {"machine": machine(broker), "events": options.events, "rounds": options.rounds, **summary(speeds)}
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


def summary(speeds: dict[str, list[Speed]]) -> dict[str, Any]:
    base = "json to json" if "json to json" in speeds else min(speeds)
    ratios = {name: ratio(column(turns, 0), column(speeds[base], 0)) for name, turns in speeds.items() if name != base}
    return {**by_name(speeds), f"speed / {base}": ratios}


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
        lines.append(f"| {name} | {speed:,.0f} | {cpu:.4f} | {shown(ratios.get(name))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
