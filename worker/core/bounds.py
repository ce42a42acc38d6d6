"""Says where a run with the setting ``until`` stops in a partition. Pure.

The metadata of each commit holds this bound, so that the next worker that reads the partition stops at the same offset.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple, TypeVar

from worker.core.events import Record
from worker.core.topic_ids import without_topic_id

RecordT = TypeVar("RecordT", bound=Record)
_METADATA: Final = re.compile(r"until=(\d{1,15});end=(\d{1,19})")


class Bound(NamedTuple):
    """The time at which a run ends, in ms since 1970, and the offset at which it stops in one partition.

    At first ``offset`` is the end that the partition had when the run first looked at it. If the worker meets an
    earlier record with a timestamp of ``until_ms`` or later, ``offset`` becomes that record's. Kafka's search for a
    time is not used: it would also find a transaction marker, and the run would miss late records behind that.
    """

    until_ms: int
    offset: int

    @property
    def metadata(self) -> str:
        """The bound as text for a commit's metadata. The caller may append the topic's id."""
        return f"until={self.until_ms};end={self.offset}"

    def is_reached(self, offset: int | None) -> bool:
        """Whether a partition is read to its end if ``offset`` is the next one to read."""
        return offset is not None and offset >= self.offset

    def within(self, records: Sequence[RecordT]) -> tuple[Sequence[RecordT], "Bound"]:
        """The records before the bound, out of N records in the order of their offsets, and the bound that holds now.

        A record without a timestamp counts as earlier than ``until_ms``.
        """
        for place, record in enumerate(records):
            if record.offset >= self.offset:
                return records[:place], self
            if record.timestamp is not None and record.timestamp >= self.until_ms:
                return records[:place], Bound(self.until_ms, record.offset)
        return records, self


def bound_in(metadata: str) -> Bound | None:
    """The bound in a commit's metadata, or None if there is none."""
    match = _METADATA.fullmatch(without_topic_id(metadata)[1])
    return Bound(int(match[1]), int(match[2])) if match else None


def ends_in(metadata: Iterable[str]) -> set[int]:
    """The ends of the runs that made these commits, in ms since 1970: one, unless several runs share a group."""
    return {bound.until_ms for each in metadata if (bound := bound_in(each))}
