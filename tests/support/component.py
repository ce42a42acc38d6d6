"""What runs beside the worker in a test: processes that end with their children, and what happens where there are none."""

import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

import pytest

T = TypeVar("T")


class UnavailableError(Exception):
    """This component cannot be had here; the message says why."""


def skip_or_fail(reason: str) -> NoReturn:
    """Skips the test with the reason. On CI it fails instead: there it must have run."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def available(start: Callable[[], T], name: str) -> T:
    """What `start` returns. Where it raises UnavailableError, the test that asked is skipped, and on CI it fails."""
    try:
        return start()
    except UnavailableError as reason:
        skip_or_fail(f"no {name} to test with ({reason})")


class ServiceProcess:
    """A process with a session of its own, so that `stop` reaches its children too; it prints into `log`.

    `user` is who it runs as, where that is not the present user: some servers refuse to be run by root.
    """

    def __init__(
        self,
        command: Sequence[object],
        log: Path,
        environment: Mapping[str, str] | None = None,
        user: str | None = None,
    ) -> None:
        self._log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=log.parent,
                env={**os.environ, **(environment or {})}, user=user, start_new_session=True,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def alive(self) -> bool:
        """True; AssertionError with what was printed last if the process has ended."""
        assert self._process.poll() is None, f"{self._process.args} ended: {self.output[-3000:]}"
        return True

    def stop(self, number: signal.Signals = signal.SIGTERM, seconds: float = 20) -> None:
        """Sends the signal and waits; kills what is left after so many seconds. May be called again."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)
            try:
                self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait(seconds)
