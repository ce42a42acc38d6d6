"""Keeps records that are too old from being scored. Pure: the caller passes the clock and the decoder."""

from collections.abc import Callable, Sequence
from itertools import compress

from worker.core.decoder import Decoder
from worker.core.events import Decoded, Record, TooOld


class MaxAge:
    """Decodes records with ``decoder``, except those that are older than ``seconds``.

    The age of a record is what ``clock`` says (s since 1970) minus the record's timestamp. A record without a timestamp
    has no age, and a null has no text: both are decoded as usual.
    """

    def __init__(self, decoder: Decoder, seconds: float, clock: Callable[[], float]) -> None:
        self._decoder = decoder
        self.seconds = seconds
        self._clock = clock

    def decode_all(self, records: Sequence[Record], new_from: int | None) -> list[Decoded]:
        """For each of N records of one partition: what the decoder answers, or TooOld.

        Records with the offset ``new_from`` or a later one were written less than ``seconds`` ago. None means that
        nothing is known of when they were written.
        """
        oldest_ms = (self._clock() - self.seconds) * 1000
        is_fresh = [
            (time := record.timestamp) is None or not 0 <= time < oldest_ms or record.value is None
            for record in records
        ]
        if all(is_fresh):
            return self._decoder.decode_all(records)
        decoded = iter(self._decoder.decode_all(list(compress(records, is_fresh))))
        return [
            next(decoded)
            if fresh
            else TooOld.WHEN_WRITTEN
            if new_from is not None and record.offset >= new_from
            else TooOld.WHEN_READ
            for record, fresh in zip(records, is_fresh, strict=True)
        ]
