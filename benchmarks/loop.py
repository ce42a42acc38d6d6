"""How late the worker's event loop is on a backlog, on a real Kafka: `python -m benchmarks.loop TEXTS.csv`.

Writes benchmarks/results/loop.{json,md}. What takes long there holds up heartbeats, HTTP and all other partitions; no stage
is to take more than 20 ms. The cases take turns:

- a model that costs nothing, so that the plumbing is all there is: at-least-once, without the cache of results, with garbage
  looked for every second (by itself the worker does it once a minute in a backlog, so not at all within a turn), and
  exactly-once;
- a model of the card's architecture, whose threads want the interpreter too, at Python's switch interval and at shorter
  ones. Shorter ones have brought nothing: the worker leaves it as it is.
"""

import argparse
import os
import random
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import machine, make_checkpoint, read_texts, write
from benchmarks.end_to_end import PLUMBING_WINDOW, Start, measured, records, worker
from tests.support.broker import start_broker
from tests.support.topics import Record

CACHE_SIZE = 65_536  # the default
FIGURES = ("most_ms", "p99_ms", "most_by_itself_ms", "events_per_s")


class Case(NamedTuple):
    """What is started, and what it reads."""

    name: str
    start: Start
    sent: Sequence[Record]


def main() -> None:
    options = parsed_options()
    texts = read_texts(options.texts)
    with tempfile.TemporaryDirectory() as name, closing(start_broker()) as broker:
        folder = Path(name)
        lag_file = folder / "lag"
        cases = [
            *plumbing(records(texts, options.plumbing_events), lag_file),
            *with_a_model(make_checkpoint(folder / "card"), records(texts, options.events), lag_file),
        ]
        turns: dict[str, list[list[float]]] = {case.name: [] for case in cases}
        for turn in range(options.rounds):
            for case in random.Random(turn).sample(cases, len(cases)):
                lag_file.unlink(missing_ok=True)
                speed = measured(case.start, broker, folder, case.sent)
                turns[case.name].append([*map(float, lag_file.read_text().split()), round(speed.events_per_s, 1)])
                print(turn + 1, case.name, turns[case.name][-1], flush=True)
        figures = {
            "machine": machine(broker),
            "rounds": options.rounds,
            "cases": {name: dict(zip(FIGURES, zip(*rows, strict=True), strict=True)) for name, rows in turns.items()},
        }
    write("loop", figures, table(figures))


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="CSV file with a column text")
    parser.add_argument("--events", type=int, default=4_000, help="with a model (default: 4000)")
    parser.add_argument("--plumbing-events", type=int, default=200_000, help="without (default: 200000)")
    parser.add_argument("--rounds", type=int, default=3, help="times that all take turns (default: 3)")
    return parser.parse_args()


def plumbing(sent: Sequence[Record], lag_file: Path) -> list[Case]:
    def costless(more: dict[str, str] | None = None, **settings: object) -> Start:
        variables = {"LAG_FILE": str(lag_file), "PROBED": "tests.support.costless_model", **(more or {})}
        return worker(
            "benchmarks.probed",
            PLUMBING_WINDOW,
            variables=variables,
            **{"cache_size": CACHE_SIZE, **settings},
        )

    return [
        Case("plumbing, at-least-once", costless(), sent),
        Case("the same, without the cache", costless(cache_size=0), sent),
        Case("the same, garbage looked for every second", costless({"GARBAGE_S": "1"}), sent),
        Case("plumbing, exactly-once", costless(delivery="exactly-once"), sent),
    ]


def with_a_model(checkpoint: Path, sent: Sequence[Record], lag_file: Path) -> list[Case]:
    engine = {"backend": "torch", "cpu_threads": os.cpu_count(), "max_batch_tokens": 1_024}  # the same for all

    def probed(switch_ms: float) -> Start:
        variables = {"LAG_FILE": str(lag_file), "SWITCH_S": str(switch_ms / 1000)}
        return worker("benchmarks.probed", variables=variables, model=checkpoint, **engine)

    return [Case(f"a model, switch interval {ms:g} ms", probed(ms), sent) for ms in (5, 1, 0.2)]


def table(figures: dict[str, Any]) -> str:
    who = figures["machine"]
    lines = [
        f"Machine: {who['cpu']}, {who['cores']} cores, which the broker shares. "
        f"Medians of {figures['rounds']} rounds in turn; in brackets minimum and maximum.",
        "",
        "| event loop late, ms | at most | 99 % | at most by its own work | events/s |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, case in figures["cases"].items():
        cells = (
            f"{statistics.median(case[key]):,.1f} ({min(case[key]):,.1f} to {max(case[key]):,.1f})" for key in FIGURES
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
