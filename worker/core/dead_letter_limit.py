"""The limit on dead letters: it is exceeded where their share of the newest records is too large. Pure."""

from collections import Counter, deque
from collections.abc import Mapping

from worker.reasons import Reason, SkipReason


class TooManyDeadLetters(Exception):
    """Too many of the newest records cannot be scored; the message names the commonest reason. Exit code 1."""


class DeadLetterLimit:
    """Watches the share of dead letters among the newest records.

    ``limit`` is the share, from 0 to 1, at which ``observe`` raises; with 0 it never does. The newest records are those of
    the newest micro-batches that together have at least ``window`` records; before there are so many, it does not raise.
    """

    def __init__(self, *, limit: float, window: int) -> None:
        self._limit = limit
        self._window = window
        self._batches: deque[tuple[int, Counter[Reason | SkipReason]]] = deque()
        self._records = 0
        self._reasons: Counter[Reason | SkipReason] = Counter()

    def observe(self, records: int, reasons: Mapping[Reason | SkipReason, int]) -> None:
        """Takes the size of one more micro-batch, and how many of its records fail for each reason.

        Raises TooManyDeadLetters where the limit is reached.
        """
        if not self._limit:
            return
        self._batches.append((records, Counter(reasons)))
        self._records += records
        self._reasons.update(reasons)
        while self._records - self._batches[0][0] >= self._window:
            oldest, of_oldest = self._batches.popleft()
            self._records -= oldest
            self._reasons -= of_oldest
        failed = self._reasons.total()
        if self._records >= self._window and failed >= self._limit * self._records:
            raise TooManyDeadLetters(self._message(failed))

    def _message(self, failed: int) -> str:
        (reason, times), *_ = self._reasons.most_common(1)
        return (
            f"{failed} of the last {self._records} records cannot be scored, most of them ({times}) for {reason}: that "
            f"reaches dead_letter_limit = {self._limit:g}; what is published is committed, and the rest is read again; "
            f"fix their producer, {'a clock, ' if reason == 'too_old' else ''}this worker's settings or the output topic's, "
            "or raise the limit (0: none)"
        )
