"""How many files this process may have open, sockets among them, and how many it needs."""

import contextlib
from typing import Final

from worker.printable import counted

try:
    import resource
except ImportError:  # Windows, which has no such limit
    resource = None  # type: ignore[assignment]

OTHERS: Final = 64  # standard streams, the event loop, the model's files, whoever asks over HTTP
CONNECTIONS: Final = (
    6  # to each broker: of consumer and producer for records, metadata and coordination, and of short ones
)
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


def files_needed(brokers: int) -> int:
    """How many files a worker may need beside so many brokers, with any number of partitions."""
    return OTHERS + CONNECTIONS * brokers


def check_limit(brokers: int) -> tuple[bool, str]:
    """Whether the limit is high enough beside so many brokers, and a sentence with the numbers."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if resource else -1
    needed = files_needed(brokers)
    beside = counted(brokers, "broker")
    if limit < 0:  # infinity
        return True, f"there is no limit of open files; a worker may need {needed} beside {beside}"
    if limit >= needed:
        return True, f"{limit} may be open; a worker may need {needed} beside {beside}"
    advice = "raise the limit (ulimit -Hn, systemd's LimitNOFILE, docker's --ulimit nofile)"
    return False, f"{limit} files may be open, and a worker may need {needed} beside {beside}: {advice}"
