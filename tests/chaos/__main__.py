"""Chaos: `python -m tests.chaos`. Feeds events, disturbs the workers again and again, and accounts for every event.

Exit code 0 only if the audit passes. The seed, which is printed, gives the same acts in the same order.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from confluent_kafka import KafkaException

from tests.chaos.acts import ACTS, OF_SEVERAL_BROKERS, plan
from tests.chaos.driver import Fleet, Scene, scene
from tests.support.waiting import wait_for

FIRST_RESULTS = 50
GROWTH_MB = 50  # of the largest worker, from the run's first fifth to its last: buffers fill, and nothing else may


def main() -> int:
    options = parsed_options()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that broker and workers end with it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    say(options, f"seed {options.seed}: {options.events:,} events, {options.acts} acts, {options.delivery}")
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder = Path(name) if options.keep is None else options.keep
        report = run(options, folder)
    if options.report:
        options.report.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    print(json.dumps(report, ensure_ascii=False) if options.json else table(report))
    return 0 if report["passed"] else 1


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--delivery", choices=("at-least-once", "exactly-once"), default="at-least-once")
    parser.add_argument("--events", type=int, default=50_000, help="events to feed (default: 50,000)")
    parser.add_argument("--acts", type=int, default=20, help="acts, spread evenly over the feed (default: 20)")
    parser.add_argument("--rate", type=float, default=500, help="events per second (default: 500)")
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000), help="of the acts (default: any)")
    parser.add_argument("--only", nargs="+", choices=list(ACTS), help="these acts, in turn")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--report", type=Path, help="write the report to this file, as JSON")
    parser.add_argument("--keep", type=Path, help="an existing folder for what the workers print; it is kept")
    return parser.parse_args()


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One run and its audit. Blocks for as long as the feed takes, and the rest after it."""
    chance = random.Random(options.seed)
    began = time.monotonic()
    acts: list[dict[str, Any]] = []
    failures: list[str] = []
    with scene(folder, events=options.events, rate=options.rate, delivery=options.delivery) as stage:
        names = plan(options.acts, chance, has_several_brokers=bool(stage.nodes))
        if not stage.nodes:
            say(options, f"one broker alone, for there is no Java: without {', '.join(sorted(OF_SEVERAL_BROKERS))}")
        if options.only:
            names = [options.only[number % len(options.only)] for number in range(options.acts)]
        share = options.events // max(1, options.acts)
        stage.feed.allowed = share
        stage.feed.start()
        fed = time.monotonic()
        leaks: list[str] = []
        wait_for(lambda: stage.results() > FIRST_RESULTS, "the first results")
        stage.note_what_is_held()
        stage.fleet.resident.clear()  # what workers held while they were starting, which takes long on a busy machine
        try:
            for number, name in enumerate(names):
                half = share * number + share // 2
                wait_for(lambda half=half: stage.feed.offered >= half, "the feed", 600)  # type: ignore[misc]
                acts.append(played(stage, name, chance, fed))
                stage.feed.allowed = max(stage.feed.allowed, share * (number + 2))
                say(options, f"{acts[-1]['at_s']:7.1f} s +{acts[-1]['took_s']:5.1f}  {name}: {acts[-1]['what']}")
            stage.calm()
            stage.feed.allowed = options.events
            leaks = stage.finish()
        except (AssertionError, subprocess.TimeoutExpired, KafkaException) as error:
            failures.append(f"the run ended early: {error}")  # what it has done is accounted for all the same
        say(options, "auditing ...")
        found = stage.audit()
    failures += (
        found.failures(options.delivery) + stage.fleet.surprises + [f"more than at the start: {leak}" for leak in leaks]
    )
    memory = memory_mb(stage.fleet)
    if memory["late"] > memory["early"] + GROWTH_MB:
        failures.append(f"memory has grown from {memory['early']} to {memory['late']} MB")
    return {
        "seed": options.seed,
        "delivery": options.delivery,
        "rate": options.rate,
        "seconds": round(time.monotonic() - began, 1),
        "passed": not failures,
        "failures": failures,
        "audit": {**asdict(found), "repeated_share": found.repeated_share},
        "exits": stage.fleet.exits,
        "memory_mb": memory,
        "census": [asdict(census) for census in stage.before],
        "leaks": leaks,
        "acts": acts,
    }


def played(stage: Scene, name: str, chance: random.Random, fed: float) -> dict[str, Any]:
    began = time.monotonic()
    what = ACTS[name](stage, chance)
    return {"at_s": round(began - fed, 1), "took_s": round(time.monotonic() - began, 1), "act": name, "what": what}


def memory_mb(fleet: Fleet) -> dict[str, float]:
    """Of the largest worker, at each sample: the median of the run's first and last fifth, and the peak."""
    sizes = [size for _, size in fleet.resident]
    fifth = max(1, len(sizes) // 5)
    halves = sorted(sizes[:fifth]), sorted(sizes[-fifth:])
    early, late = (round(half[len(half) // 2] / 1e6, 1) if half else 0.0 for half in halves)
    return {"early": early, "late": late, "peak": round(max(sizes, default=0) / 1e6, 1)}


def table(report: dict[str, Any]) -> str:
    found = report["audit"]
    rows = [
        ("delivery", report["delivery"]),
        ("seed", report["seed"]),
        ("acts", len(report["acts"])),
        ("events", f"{found['events']:,}"),
        ("outcomes", ", ".join(f"{count:,} {kind}" for kind, count in sorted(found["kinds"].items()))),
        ("lost", found["lost"]),
        ("twice", f"{found['repeated']:,} events; {found['repeated_share']:.3%} repeats"),
        ("repeats explained", f"{found['repeats']:,} of at most {found['explained']:,}"),
        ("leaks", ", ".join(report["leaks"]) or "none"),
        ("out of order", found["disordered"]),
        ("wrong", found["wrong"]),
        ("endings of workers", ", ".join(f"{count} {how}" for how, count in sorted(report["exits"].items()))),
        ("memory, MB", ", ".join(f"{name} {size}" for name, size in report["memory_mb"].items())),
        ("seconds", report["seconds"]),
        ("verdict", "passed" if report["passed"] else "FAILED"),
    ]
    lines = [f"{name:20}{value}" for name, value in rows]
    return "\n".join([*lines, *(f"- {failure}" for failure in report["failures"])])


def say(options: argparse.Namespace, words: str) -> None:
    print(words, file=sys.stderr if options.json else sys.stdout, flush=True)


if __name__ == "__main__":
    sys.exit(main())
