"""What those who look at the console cost the worker: `python -m benchmarks.console TEXTS.csv`.

Writes benchmarks/results/console.{json,md}. The worker with a model that costs nothing reads the same backlog without
anybody who looks, and with 100 clients that take a few bytes a second; in each round both take turns, in another order each
time, and are measured as in benchmarks/end_to_end.py.
"""

import argparse
import contextlib
import socket
import statistics
import tempfile
import threading
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.common import Process, machine, read_texts, write
from benchmarks.end_to_end import Case, Start, compare, records, worker
from tests.support.broker import start_broker
from tests.support.process import WorkerProcess
from tests.support.topics import Topics

CLIENTS = 100
SLOW_BYTES = 16  # a second
RECEIVE_BYTES = 4_096  # what the kernel holds for a client that does not read
REQUEST = b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n"


def main() -> None:
    options = parsed_options()
    costless = worker("tests.support.costless_model")
    contestants = {
        "nobody looks": costless,
        f"{CLIENTS} slow clients": watched(costless),
    }
    with tempfile.TemporaryDirectory() as name, closing(start_broker()) as broker:
        case = Case("console", records(read_texts(options.texts), options.events), contestants)
        figures = {
            "machine": machine(broker),
            "rounds": options.rounds,
            **compare(case, broker, Path(name), options.rounds),
        }
    write("console", figures, table(figures))


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="CSV file with a column text")
    parser.add_argument("--events", type=int, default=200_000, help="of the backlog (default: 200000)")
    parser.add_argument("--rounds", type=int, default=5, help="times that all take turns (default: 5)")
    return parser.parse_args()


def watched(start: Start) -> Start:
    def start_with_clients(folder: Path, bootstrap: str, topics: Topics) -> Process:
        process = start(folder, bootstrap, topics)
        assert isinstance(process, WorkerProcess)
        return Watched(process, Clients(process.url))

    return start_with_clients


class Clients(threading.Thread):
    """So many streams of a worker's console; one that the worker drops is opened anew."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._address = (urlsplit(url).hostname, urlsplit(url).port)
        self._ending = threading.Event()
        self._open: list[socket.socket] = []
        self.start()

    def run(self) -> None:
        while not self._ending.wait(1 if self._open else 0.1):
            with contextlib.suppress(OSError):  # the worker does not listen yet
                self._open += [self._opened() for _ in range(CLIENTS - len(self._open))]
            self._open = [each for each in self._open if self._read(each)]
        for each in self._open:
            each.close()

    def end(self) -> None:
        self._ending.set()
        self.join()

    def _opened(self) -> socket.socket:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        client.connect(self._address)
        client.sendall(REQUEST)
        client.setblocking(False)
        return client

    def _read(self, client: socket.socket) -> bool:
        """False where the worker has closed it."""
        try:
            return bool(client.recv(SLOW_BYTES))
        except BlockingIOError:
            return True
        except OSError:
            return False


class Watched:
    """A worker with those who look at it."""

    def __init__(self, process: WorkerProcess, clients: Clients) -> None:
        self._process = process
        self._clients = clients

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.is_running

    @property
    def output(self) -> str:
        return self._process.output

    def terminate(self) -> int:
        self._clients.end()
        return self._process.terminate()

    def kill(self) -> None:
        self._process.kill()


def table(figures: dict[str, Any]) -> str:
    names = list(figures["events_per_s"])
    nobody = figures["events_per_s"][names[0]]
    lines = [
        f"Machine: {figures['machine']['cpu']}, {figures['machine']['cores']} cores, which broker and clients share. "
        f"{figures['events']:,} events, a model that costs nothing, {figures['rounds']} rounds in turn; medians, in "
        "brackets minimum and maximum.",
        "",
        "| who looks | events/s | CPU s per 1,000 events | speed, beside nobody |",
        "| --- | --- | --- | --- |",
    ]
    for name in names:
        speeds, cpu = figures["events_per_s"][name], figures["cpu_s_per_1000"][name]
        ratios = sorted(one / other for one, other in zip(speeds, nobody, strict=True))
        lines.append(
            f"| {name} | {statistics.median(speeds):,.0f} ({min(speeds):,.0f} to {max(speeds):,.0f}) "
            f"| {statistics.median(cpu):.4f} | {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}) |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
