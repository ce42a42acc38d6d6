"""Waiting for something to become true, with a deadline."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def wait_for(
    condition: Callable[[], T],
    what: str,
    seconds: float = 120,
    every: float = 0.1,
    describe: Callable[[], object] = lambda: "",
) -> T:
    """The first truthy value of `condition`; AssertionError with `what` and `describe()` when none comes in time."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"after {seconds:g} s still waiting for {what} {describe()}"
        time.sleep(every)


def wait_until_frozen(pid: int) -> None:
    """Waits until no thread of a process that was sent SIGSTOP runs any more; on a busy machine others go on for a while."""

    def is_frozen() -> bool:
        threads = Path(f"/proc/{pid}/task")
        try:
            return all(thread.read_text().rpartition(") ")[2][0] in "TZX" for thread in threads.glob("*/stat"))
        except (FileNotFoundError, ProcessLookupError):  # one has just ended
            return False

    wait_for(is_frozen, "a process to stand still", every=0.002)


def holds_for(condition: Callable[[], object], what: str, seconds: float, every: float = 0.2) -> None:
    """Asserts that `condition` is true, and stays so for `seconds`: for what must not happen."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert condition(), f"no longer true: {what}"
        time.sleep(every)
