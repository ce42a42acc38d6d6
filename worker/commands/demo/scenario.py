"""The demo from start to end: starts broker and worker, sends, reads and shows, and compares the counts."""

import contextlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import confluent_kafka as kafka
from rich.console import Console

from worker.commands.demo.broker import TOPICS
from worker.commands.demo.counts import DemoCounts, WorkerCounts, discrepancies, summary
from worker.commands.demo.messages import Message, endless_passes, one_pass, reviews
from worker.commands.demo.processes import (
    DemoError,
    Stop,
    broker_process,
    check_alive,
    drain,
    free_port,
    http_get,
    tail,
    wait_until_ready,
    worker_command,
    worker_process,
)
from worker.commands.demo.traffic import Traffic
from worker.commands.demo.views import LinesView, LiveView, View, say, waiting
from worker.settings.commands import DemoSettings

OUTCOMES_S = 20
MOST_IN_FLIGHT = 2_000  # the mock keeps the last 5 MB of a partition, read or not
TICK_S = 0.02


class DemoRun:
    """The demo while broker and worker run: sends, reads and shows in turn, on one thread."""

    def __init__(
        self,
        *,
        worker: subprocess.Popen[bytes],
        port: int,
        traffic: Traffic,
        counts: DemoCounts,
        view: View,
        stop: Stop,
    ) -> None:
        self._worker = worker
        self._port = port
        self._traffic = traffic
        self._counts = counts
        self._view = view
        self._stop = stop

    def send(self, messages: Iterable[Message], rate: float) -> None:
        """Sends at random moments, ``rate`` a second on average. Blocks until all is sent, or until Ctrl-C."""
        moments = random.Random(7)
        due = time.monotonic()
        for message in messages:
            due += moments.expovariate(rate)
            self._wait_until(due)
            if self._stop.asked:
                break
            self._traffic.send(message, time.monotonic())
        self._traffic.flush()

    def _wait_until(self, due: float) -> None:
        while True:
            left = due - time.monotonic()
            self._watch(max(0.0, min(TICK_S, left)))
            if self._stop.asked or (left <= 0 and self._counts.in_flight < MOST_IN_FLIGHT):
                return

    def wait_for_outcomes(self) -> WorkerCounts:
        """The worker's counts, once each event has an outcome that it has counted, or after OUTCOMES_S. Blocks."""
        deadline = time.monotonic() + OUTCOMES_S
        worker_counts = self._worker_counts()
        while (self._counts.in_flight or worker_counts.sum < self._counts.delivered) and time.monotonic() < deadline:
            self._watch(TICK_S)
            if not self._counts.in_flight:
                worker_counts = self._worker_counts()
        return self._worker_counts()

    def _watch(self, wait_s: float) -> None:
        self._traffic.read(wait_s)
        self._view.show(time.monotonic())
        check_alive(self._worker)

    def _worker_counts(self) -> WorkerCounts:
        try:
            return WorkerCounts.parse(http_get(self._port, "/metrics")[1])
        except OSError as error:
            raise DemoError(f"The worker's /metrics does not answer: {error}.") from error


def run_demo(settings: DemoSettings, console: Console, live: bool, stop: Stop, folder: Path) -> bool:
    """Runs all processes from start to end, their logs in ``folder``; whether the counts agree and the worker drained."""
    with contextlib.ExitStack() as stack:
        servers = stack.enter_context(broker_process(folder / "broker.log"))
        port = free_port()
        worker = stack.enter_context(worker_process(worker_command(servers, port), folder / "worker.log"))
        with waiting(console, "Starting the worker: it loads its model and joins its group ...", live) as tell:
            wait_until_ready(worker, port, stop, tell)
        counts = DemoCounts()
        traffic = stack.enter_context(contextlib.closing(Traffic(servers, counts)))
        messages, total = _messages(settings)
        addresses = f"metrics  http://127.0.0.1:{port}/metrics", f"broker   {servers}, topics {', '.join(TOPICS)}"
        view = (LiveView if live else LinesView)(console, counts, total, addresses)
        demo = DemoRun(worker=worker, port=port, traffic=traffic, counts=counts, view=view, stop=stop)
        with view:
            demo.send(messages, settings.rate)
            worker_counts = demo.wait_for_outcomes()
        exit_code = drain(worker)
        committed = traffic.committed()
    say(console, f"\n{summary(counts, worker_counts, committed)}")
    wrong = discrepancies(counts, worker_counts, committed, exit_code)
    if wrong:
        say(console, "\n".join(["It does NOT add up:", *wrong]), "bold red")
    else:
        say(console, "It adds up, and the worker drained.", "bold green")
    return not wrong


def _messages(settings: DemoSettings) -> tuple[Iterable[Message], int | None]:
    if settings.keep_running:
        return endless_passes(reviews(), settings.events), None
    messages = one_pass(reviews(), settings.events)
    return messages, len(messages)


def run(settings: DemoSettings) -> int:
    """Runs the demo with its extra installed; the exit code is 0 if everything adds up and the worker drained, else 1."""
    live = sys.stdout.isatty() and not settings.plain
    console = Console(no_color=None if live else True, force_terminal=live)
    folder = Path(tempfile.mkdtemp(prefix="sentiment-worker-demo-"))
    try:
        with Stop() as stop:
            adds_up = run_demo(settings, console, live, stop, folder)
    except (DemoError, kafka.KafkaException) as error:
        sys.stderr.write(f"{error}\n{tail(folder / 'worker.log')}")
        adds_up = False
    except KeyboardInterrupt:
        sys.stderr.write("Stopped before anything could add up.\n")
        shutil.rmtree(folder)
        return 130
    if adds_up:
        shutil.rmtree(folder)
        return 0
    sys.stderr.write(f"The logs of the broker and the worker are in {folder}.\n")
    return 1
