"""How many files this process may have open, sockets among them, and how many it needs."""

import contextlib
from typing import Final

try:
    import resource
except ImportError:  # Windows, which has no such limit
    resource = None  # type: ignore[assignment]

OTHERS: Final = 64  # standard streams, the event loop, the model's files, whoever asks over HTTP
CLIENTS: Final = 3  # of a worker that has one producer; each has a connection to each broker
LARGEST_LIMIT: Final = 10_240  # the most that macOS takes, although it says that there is no limit


def raise_limit() -> None:
    """Raises this process's limit of open files as far as it may: the soft limit to the hard one."""
    if resource is None:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in (hard, LARGEST_LIMIT):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            return


def files_needed(partitions: int, brokers: int, *, exactly_once: bool) -> int:
    """How many files so many input partitions may need.

    With exactly-once each partition has a producer of its own, which has a connection to each broker that leads a partition
    of the output, and one to each of its coordinators.
    """
    per_partition = brokers + min(brokers, 2) if exactly_once else 0
    return OTHERS + CLIENTS * brokers + partitions * per_partition


def check_limit(partitions: int, brokers: int, *, exactly_once: bool) -> tuple[bool, str]:
    """Whether the limit is high enough for so many input partitions, and a sentence with the numbers."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if resource else -1
    needed = files_needed(partitions, brokers, exactly_once=exactly_once)
    if limit < 0:  # infinity
        return True, f"there is no limit of open files; {partitions} partitions may need {needed}"
    if limit >= needed:
        return True, f"{limit} may be open; {partitions} partitions may need {needed}"
    advice = "raise the limit (ulimit -Hn, systemd's LimitNOFILE, docker's --ulimit nofile) or run more workers"
    return False, f"{limit} files may be open, and {partitions} partitions may need {needed}: {advice}"
