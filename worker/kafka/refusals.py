"""What the brokers refuse for good: the errors and their reasons, and when to log it."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final

from aiokafka.errors import InvalidTimestampError, MessageSizeTooLargeError, RecordListTooLargeError, UnknownError

from worker.reasons import Reason

log = logging.getLogger(__name__)

QUIET_S: Final = 60.0  # after so long without a refusal it has ended

REFUSALS: Final[dict[type[BaseException], Reason]] = {
    MessageSizeTooLargeError: "result_too_large",
    RecordListTooLargeError: "result_too_large",
    InvalidTimestampError: "invalid_timestamp",
}
# After these errors the topic's limits are read again. UnknownError is Kafka's code 87, which aiokafka does not know: a
# compacted topic refuses a record without a key.
LIMITS_MAY_HAVE_CHANGED: Final = {*REFUSALS, UnknownError}


class RefusalLog:
    """Logs when a topic begins to refuse results, and when it has refused none for QUIET_S."""

    def __init__(self, topic: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._topic = topic
        self._clock = clock
        self._refused: Counter[Reason] = Counter()
        self._last_at = 0.0

    @property
    def is_active(self) -> bool:
        """Whether a result was refused within the last QUIET_S."""
        return bool(self._refused)

    def note(self, reasons: Mapping[Reason, int]) -> None:
        """Takes how many of the records just published were refused, by reason; none if all were taken."""
        for reason in reasons.keys() - self._refused.keys():
            log.warning("results are refused, and become dead letters", extra={"topic": self._topic, "reason": reason})
        self._refused.update(reasons)
        if reasons:
            self._last_at = self._clock()
        elif self._refused and self._clock() - self._last_at >= QUIET_S:
            log.info(
                "no result has been refused for a minute", extra={"topic": self._topic, "were": dict(self._refused)}
            )
            self._refused.clear()
