"""From a process's start to ready and to its first result, memory at ready and after a backlog, and the backlog's speed.

Other trees of this repository, such as a worktree of an older commit, take turns with this one:

    python -m benchmarks.start ../shared/data/rureviews/rureviews.csv --other before=../worktree
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import event, machine, make_checkpoint, ratio, read_texts, write
from tests.support.broker import Broker, start_broker
from tests.support.process import WorkerProcess
from tests.support.topics import Kafka, Topics
from tests.support.waiting import wait_for

ROOT = Path(__file__).parents[1]


def main() -> None:
    options = parsed_options()
    texts = read_texts(options.texts)
    trees = {"this": ROOT, **dict(options.other)}
    broker = start_broker()
    try:
        with tempfile.TemporaryDirectory() as name:
            models = {"card's architecture": str(make_checkpoint(Path(name) / "card")), "builtin": "builtin"}
            figures: dict[str, Any] = {"machine": machine(broker), "events": options.events}
            for title, model in models.items():
                figures[title] = {tree: [] for tree in trees}
                for turn in range(options.rounds):
                    for tree, path in trees.items():
                        events = options.events if turn == 0 or title == "builtin" else options.events // 5
                        measured = measure(broker, model, path, texts, events, Path(name))
                        figures[title][tree].append(measured)
                        print(title, tree, measured, flush=True)
    finally:
        broker.close()
    write("start", figures, table(figures))


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="CSV file with a column text")
    parser.add_argument("--other", action="append", default=[], type=named_tree, help="NAME=FOLDER of another tree")
    parser.add_argument("--rounds", type=int, default=3, help="times that the trees take turns (default: 3)")
    parser.add_argument("--events", type=int, default=100_000, help="events of the first round (default: 100000)")
    return parser.parse_args()


def named_tree(given: str) -> tuple[str, Path]:
    name, _, folder = given.partition("=")
    return name, Path(folder).resolve()


def measure(
    broker: Broker, model: str, tree: Path, texts: Sequence[str], events: int, folder: Path
) -> Mapping[str, float]:
    """One worker of a tree: its start beside one waiting event, then a backlog without a cache of results."""
    kafka, topics = Kafka(broker.bootstrap), Topics.unique()
    kafka.create_all(topics, 4)
    kafka.send(topics.input, [event(0, texts[0])])
    started = time.perf_counter()
    worker = WorkerProcess(
        folder,
        variables={"PYTHONPATH": str(tree)},
        bootstrap_servers=broker.bootstrap,
        input_topics=topics.input,
        output_topic=topics.output,
        dead_letter_topic=topics.dead_letters,
        group_id=topics.group,
        model=model,
        cache_size=0,
    )
    try:
        wait_for(lambda: worker.status("/readyz") == 200, "ready", 120, every=0.005)
        ready_s = time.perf_counter() - started
        wait_for(lambda: kafka.count(topics.output) == 1, "the first result", 60, every=0.01)
        first_result_s = time.perf_counter() - started
        ready_mb = memory_mb(worker.pid)
        kafka.send(topics.input, [event(number, texts[number % len(texts)]) for number in range(1, events)])
        sent = time.perf_counter()
        wait_for(lambda: kafka.count(topics.output) >= events, "all results", 3_000, every=0.2)
        took_s = time.perf_counter() - sent
        after_mb = memory_mb(worker.pid)
        assert worker.terminate() == 0
    finally:
        if worker.is_running:
            worker.kill()
    return {
        "ready_s": round(ready_s, 2),
        "first_result_s": round(first_result_s, 2),
        "memory_at_ready_mb": ready_mb,
        "memory_after_mb": after_mb,
        "events": events,
        "events_per_s": round(events / took_s, 1),
    }


def memory_mb(pid: int) -> int:
    """Resident memory of a process, MB (of 10^6 bytes)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (resident,) = (line.split()[1] for line in lines if line.startswith("VmRSS:"))
    return round(int(resident) * 1024 / 1e6)


def table(figures: dict[str, Any]) -> str:
    """The medians of each tree, and the ratio of the speeds of a backlog."""
    units = {
        "ready_s": "start to ready, s",
        "first_result_s": "start to the first result, s",
        "memory_at_ready_mb": "memory at ready, MB",
        "memory_after_mb": f"memory after {figures['events']} events, MB",
        "events_per_s": "events/s of a backlog",
    }
    cpu = figures["machine"]["cpu"]
    rows = [f"Machine: {cpu}, {figures['machine']['cores']} cores. Medians of rounds in turn.", ""]
    for title, trees in figures.items():
        if title in ("machine", "events"):
            continue
        rows += [f"| {title} | {' | '.join(trees)} |", "| --- |" + " --- |" * len(trees)]
        for name, unit in units.items():
            first = 1 if name == "memory_after_mb" else None  # the first round alone has all events
            medians = [statistics.median([each[name] for each in rounds[:first]]) for rounds in trees.values()]
            rows.append(f"| {unit} | {' | '.join(f'{median:g}' for median in medians)} |")
        speeds = {tree: [each["events_per_s"] for each in rounds] for tree, rounds in trees.items()}
        rows += [
            f"\nThis / {tree}, events/s: {ratio(speeds['this'], speeds[tree])}" for tree in trees if tree != "this"
        ]
        rows.append("")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
