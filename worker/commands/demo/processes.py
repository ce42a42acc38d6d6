"""The broker's and the worker's processes: how they start, become ready, drain and end, and the signal to do so."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Self

from worker.commands.demo.broker import DEAD_LETTER_TOPIC, GROUP, INPUT_TOPIC, OUTPUT_TOPIC

READY_S = 120
DRAIN_S = 30


class DemoError(Exception):
    """The demo cannot go on; the message is one sentence for its user."""


class Stop:
    """Handles Ctrl-C, SIGTERM and the terminal's end: the first asks for an orderly end, the second ends at once.

    Inside of its ``with`` block the first one sets ``asked``, the second raises KeyboardInterrupt, and later ones do
    nothing, so that the processes are ended undisturbed.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        signals = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup means it
            signals.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._on_signal) for number in signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.asked:
            self.asked = True
            return
        for each in self._before:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt


@contextlib.contextmanager
def broker_process(log: Path) -> Iterator[str]:
    """The embedded broker's address; the broker has ended when this has. DemoError when it does not start."""
    with (
        log.open("wb") as errors,
        _process([sys.executable, "-m", "worker.commands.demo.broker"], errors, os.environ) as broker,
    ):
        assert broker.stdout is not None
        address = broker.stdout.readline().decode().strip()
        if not address:
            raise DemoError("The embedded broker did not start.")
        yield address


@contextlib.contextmanager
def worker_process(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The worker with its command's settings alone; it has ended, by force if need be, when this has."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WORKER_")}
    with log.open("wb") as output, _process(command, output, environment, output) as worker:
        yield worker


@contextlib.contextmanager
def _process(
    command: Sequence[str], errors: Any, environment: Mapping[str, str], output: Any = subprocess.PIPE
) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,  # its end ends the broker, whatever becomes of the demo
        stdout=output,
        stderr=errors,
        env=environment,
        process_group=0,  # the terminal's Ctrl-C is for the demo alone, which ends its processes in order
    )
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def worker_command(servers: str, port: int) -> list[str]:
    settings = {
        "bootstrap-servers": servers,
        "input-topics": INPUT_TOPIC,
        "output-topic": OUTPUT_TOPIC,
        "dead-letter-topic": DEAD_LETTER_TOPIC,
        "group-id": GROUP,
        "model": "builtin",
        "cpu-threads": "1",  # more threads gain nothing for so small a model, and slow it where the machine is busy
        "http-port": str(port),
        "log-format": "json",
        "fetch-max-wait-ms": "20",  # the mock sleeps all of it, even when a record arrives meanwhile
    }
    return [sys.executable, "-m", "worker", "run", *(f"--{name}={value}" for name, value in settings.items())]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def http_get(port: int, path: str) -> tuple[int, str]:
    """Status and body from this machine, past any proxy. Blocks for a few seconds at most; raises OSError."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    with contextlib.closing(connection):
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        except http.client.HTTPException as error:
            raise OSError(str(error)) from error


def wait_until_ready(worker: subprocess.Popen[bytes], port: int, stop: Stop, tell: Callable[[str], None]) -> None:
    """Blocks until the worker is ready, and tells why it is not yet.

    DemoError when it ends or takes too long; KeyboardInterrupt on stop.
    """
    deadline = time.monotonic() + READY_S
    why = "it does not answer yet"
    while not stop.asked:
        check_alive(worker)
        with contextlib.suppress(OSError):
            status, body = http_get(port, "/readyz")
            if status == http.HTTPStatus.OK:
                return
            why = body.strip()
        if time.monotonic() > deadline:
            raise DemoError(f"The worker was not ready within {READY_S} s: {why}.")
        tell(why)
        time.sleep(0.1)
    raise KeyboardInterrupt


def check_alive(worker: subprocess.Popen[bytes]) -> None:
    """DemoError when the worker has ended."""
    if worker.poll() is not None:
        raise DemoError(f"The worker ended by itself with exit code {worker.returncode}.")


def drain(worker: subprocess.Popen[bytes]) -> int:
    """Asks the worker to finish; its exit code. Blocks until it has ended. DemoError when it does not."""
    worker.terminate()
    try:
        return worker.wait(DRAIN_S)
    except subprocess.TimeoutExpired:
        raise DemoError(f"The worker did not end within {DRAIN_S} s of SIGTERM.") from None


def tail(log: Path, lines: int = 5) -> str:
    """The log's last lines, or nothing where there is no log."""
    try:
        return "".join(log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)[-lines:])
    except OSError:
        return ""
