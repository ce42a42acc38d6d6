"""A process that publishes events, for loads that one process cannot keep up: `python -m benchmarks.gpu_load …`.

Several share the numbers of the events: each takes every `--step`th from `--first` on. It prints a line when it has read the
texts, and begins when it gets one on standard input.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, cast

from benchmarks.common import event, read_texts
from benchmarks.load_generator import OpenLoop, publish
from tests.support.topics import Record


class LoadProcesses:
    """So many processes that publish to one topic: `count` events at once, or `rate` events/s for some seconds."""

    def __init__(self, processes: int, bootstrap: str, topic: str, texts: Path, first: int, **load: float) -> None:
        """Returns when they are ready. `load` is `count`, or `rate` and `seconds`, of all of them together."""
        shared = {name: value if name == "seconds" else value / processes for name, value in load.items()}
        flags = [word for name, value in shared.items() for word in (f"--{name}", str(value))]
        self._running = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu_load", bootstrap, topic, str(texts.resolve()),
                 "--first", str(first + number), "--step", str(processes), *flags],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1],
            )
            for number in range(processes)
        ]  # fmt: skip
        for process in self._running:
            assert cast("IO[bytes]", process.stdout).readline(), "a process of the load has failed"

    def start(self) -> None:
        """Lets them begin."""
        for process in self._running:
            stdin = cast("IO[bytes]", process.stdin)
            stdin.write(b"\n")
            stdin.close()

    def join(self, seconds: float = 120) -> None:
        """Waits until the broker has all events."""
        for process in self._running:
            assert process.wait(seconds) == 0, "a process of the load has failed"


def numbered(texts: Sequence[str], number: int) -> str:
    """No text comes twice: from the second time on it has a number, so that no cache answers."""
    times, place = divmod(number, len(texts))
    return texts[place] + (f" {times}" if times else "")


def main() -> None:
    options = parsed_options()
    texts = read_texts(options.texts)

    def record(number: int) -> Record:
        own = options.first + number * options.step
        return event(own, numbered(texts, own))

    print("ready", flush=True)
    sys.stdin.readline()
    if options.count:
        publish(options.bootstrap, options.topic, map(record, range(round(options.count))))
        return
    with OpenLoop(options.bootstrap, options.topic, options.rate, record, seed=options.first):
        time.sleep(options.seconds)


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bootstrap")
    parser.add_argument("topic")
    parser.add_argument("texts", type=Path, help="CSV file with a column text")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--step", type=int, default=1)
    parser.add_argument("--count", type=float, default=0, help="events, as fast as the broker takes them")
    parser.add_argument("--rate", type=float, default=0, help="events/s, at random moments")
    parser.add_argument("--seconds", type=float, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
