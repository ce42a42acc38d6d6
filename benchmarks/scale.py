"""One process with up to 1,000 input partitions, and groups, on a real Kafka: `python -m benchmarks.scale`.

Writes benchmarks/results/scale.{json,md} after each step. All of it takes about an hour; parts, partitions and deliveries
that are not asked for keep the figures that are there, if this very machine's. `--label` names a state of the code, so that
figures of several states stand beside each other. For example, in two minutes:

    python -m benchmarks.scale steady --partitions 24 --delivery exactly-once --rounds 1 --label before

Each figure is the median of its rounds, and each round has a broker of its own. The model costs nothing, but for two parts
in which a pass takes a fixed time. A wait is from the moment when the broker has an event to the moment when a reader with
read_committed can get its result, both by the broker's clock.

- steady: 200 events/s over all partitions; fast: 2,000 over 96.
- backlog: 200,000 events.
- memory: 2 MB, unpacked, of compressed batches in each partition, and a slow model.
- join: a second member, under the steady load. all_served_s: until the last event had its result that waited for 0.1 s
  longer than any did before.
- kill, kill_static: kill -9 of the process, and another one at once; without and with an instance id. The session timeout
  is 6 s, with instance ids 45 s. own_start_s is what the first process took from its start until it had all partitions.
- unequal: 24 partitions, one of which has 95 % of a backlog; the others have 100 events/s besides, whose waits are shown. A
  pass of the model takes 50 ms.
- refused: the neighbours of a partition each of whose results the output topic refuses for its size; and of one whose
  results it takes.
- rolling, rolling_static, one_to_four: four workers with 24 partitions, under the steady load.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, NamedTuple

from benchmarks import scale_parts
from benchmarks.common import RESULTS, WORKER, machine, write
from benchmarks.scale_parts import Figures

COUNTS = (1, 24, 96, 400, 1_000)
DELIVERIES = ("at-least-once", "exactly-once")
NOTE = (
    "The load, the broker and the workers share these cores. `load before` is the machine's load average when a round "
    "began: about 2 is left by the round before, and more is other programs'."
)


class Part(NamedTuple):
    measure: Callable[[int, str, float], Figures]
    title: str
    rounds: int = 1
    counts: tuple[int, ...] = ()
    """Of partitions; else those of the command line."""


PARTS = {
    "steady": Part(scale_parts.steady, f"{scale_parts.STEADY_RATE} events/s over all partitions", rounds=3),
    "fast": Part(scale_parts.fast, f"{scale_parts.FAST_RATE:,} events/s over all partitions", counts=(96,)),
    "backlog": Part(scale_parts.backlog, f"A backlog of {scale_parts.BACKLOG_EVENTS:,} events", rounds=3),
    "memory": Part(scale_parts.memory, "Memory with a backlog in every partition"),
    "join": Part(scale_parts.join, "A second member joins"),
    "kill": Part(scale_parts.kill, "kill -9 and a new process, without an instance id"),
    "kill_static": Part(scale_parts.kill_static, "kill -9 and a new process, with an instance id"),
    "unequal": Part(scale_parts.unequal, "One partition with 95 % of a backlog, and its neighbours", counts=(24,)),
    "refused": Part(scale_parts.refused, "Partition 0 with results that are refused, and its neighbours", counts=(4,)),
    "rolling": Part(scale_parts.rolling, "A rolling restart of four workers", counts=(24,)),
    "rolling_static": Part(scale_parts.rolling_static, "A rolling restart with instance ids", counts=(24,)),
    "one_to_four": Part(scale_parts.one_to_four, "From one worker to four and back", counts=(24,)),
}


class Step(NamedTuple):
    part: str
    partitions: int
    delivery: str


def main() -> int:
    options = parsed_options()
    failures = 0
    for step in steps(options):
        began = time.monotonic()
        rounds: list[Figures] = []
        for _ in range(options.rounds or PARTS[step.part].rounds):
            busy = {"load_before": round(os.getloadavg()[0], 1)}
            try:
                rounds.append(PARTS[step.part].measure(step.partitions, step.delivery, options.seconds) | busy)
                print(*step, rounds[-1], flush=True)
            except Exception:  # noqa: BLE001 - what fails is shown, and the rest of an hour's figures is still wanted
                traceback.print_exc()
                failures += 1
        if rounds:
            figures = former_figures()
            keep(figures, options.label, step, rounds)
            write("scale", figures, table(figures), is_shown=False)
        print(f"{time.monotonic() - began:.0f} s", flush=True)
    print(table(former_figures()))
    return int(failures > 0)


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--partitions", type=int, nargs="+", default=COUNTS, help=f"(default: {COUNTS})")
    parser.add_argument("--delivery", nargs="+", choices=DELIVERIES, default=DELIVERIES, help="(default: both)")
    parser.add_argument("--rounds", type=int, help="(default: 3 of a steady load and of a backlog, 1 of the rest)")
    parser.add_argument("--seconds", type=float, default=10, help="that are measured under a load, s (default: 10)")
    parser.add_argument("--label", default="now", help="name of this state of the code (default: now)")
    return parser.parse_args()


def steps(options: argparse.Namespace) -> Iterator[Step]:
    for part in options.parts or PARTS:
        for partitions in PARTS[part].counts or options.partitions:
            for delivery in options.delivery:
                yield Step(part, partitions, delivery)


# What is written.


def former_figures() -> dict[str, Any]:
    """Those that are there, without those of another machine."""
    here = {**machine(None), "broker": "a fresh one for each round"}
    path = RESULTS / "scale.json"
    figures: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    same = figures.get("machine", {}).get("cpu") == here["cpu"]
    return {"machine": here, "note": NOTE, "parts": figures["parts"] if same else {}}


def keep(figures: dict[str, Any], label: str, step: Step, rounds: list[Figures]) -> None:
    """Puts rounds in the place of former ones: part, label, partitions, delivery."""
    place = figures["parts"].setdefault(step.part, {}).setdefault(label, {}).setdefault(str(step.partitions), {})
    columns = {name: [figures[name] for figures in rounds] for name in rounds[0]}
    place[step.delivery] = {"commit": commit(), "day": f"{datetime.now(UTC):%Y-%m-%d}", "figures": columns}


def commit() -> str:
    """The last commit that changed the worker, with a plus where its files have been changed since."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(WORKER), *words, "."]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    return git("log", "-1", "--format=%h", "--") + ("+" if git("status", "--porcelain", "--") else "")


def table(figures: dict[str, Any]) -> str:
    lines = [f"Machine: {figures['machine']['cpu']}, {figures['machine']['cores']} cores. {figures['note']}"]
    for name, part in PARTS.items():
        if found := figures["parts"].get(name):
            lines += ["", f"{part.title}:", "", *rows(found)]
    return "\n".join(lines) + "\n"


def rows(part: dict[str, Any]) -> Iterator[str]:
    """A table of one part: states of the code beside each other, for each number of partitions and delivery."""
    cells = [
        (int(count), delivery, label, cell)
        for label, counts in part.items()
        for count, deliveries in counts.items()
        for delivery, cell in deliveries.items()
    ]
    names = list(dict.fromkeys(name for cell in cells for name in cell[3]["figures"]))
    yield f"| partitions | delivery | code | {' | '.join(name.replace('_', ' ') for name in names)} |"
    yield "| --- " * (len(names) + 3) + "|"
    for count, delivery, label, cell in sorted(cells, key=lambda cell: cell[:2]):
        values = [shown(cell["figures"].get(name, [])) for name in names]
        yield f"| {count:,} | {delivery} | {label} ({cell['commit']}) | {' | '.join(values)} |"


def shown(rounds: list[float]) -> str:
    """The median; nothing where the figure was not measured."""
    return f"{round(statistics.median(rounds), 3):,}" if rounds else ""


if __name__ == "__main__":
    sys.exit(main())
