"""Where a run with the setting ``until`` stops in a partition. Pure.

A commit's metadata names it, so that whoever reads the partition next stops at the same offset.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple, TypeVar

from worker.core.events import Record
from worker.core.topic_ids import without_topic_id

RecordT = TypeVar("RecordT", bound=Record)
_METADATA: Final = re.compile(r"until=(\d{1,15});end=(\d{1,19})")


class Bound(NamedTuple):
    """The run's end in ms since 1970, and where a partition ends for it.

    ``offset`` is the partition's end when the run came to it first, until a record of that time or later is met before: then
    it is that record's. So ``offset`` alone says whether the partition is read to its end, and a late record is not missed
    because of a transaction marker that is dated after it, which Kafka's search for a time would find.
    """

    until_ms: int
    offset: int

    @property
    def metadata(self) -> str:
        """Of a commit, to which the topic's id may be appended."""
        return f"until={self.until_ms};end={self.offset}"

    def is_reached(self, offset: int | None) -> bool:
        """Whether a partition of which ``offset`` comes next is read to its end."""
        return offset is not None and offset >= self.offset

    def within(self, records: Sequence[RecordT]) -> tuple[Sequence[RecordT], "Bound"]:
        """The first of N records in the order of their offsets, as far as they are before the bound; and the bound then.

        A record without a timestamp is taken for one of before the end.
        """
        for place, record in enumerate(records):
            if record.offset >= self.offset:
                return records[:place], self
            if record.timestamp is not None and record.timestamp >= self.until_ms:
                return records[:place], Bound(self.until_ms, record.offset)
        return records, self


def bound_in(metadata: str) -> Bound | None:
    """The bound that a commit's metadata names; None where it names none."""
    match = _METADATA.fullmatch(without_topic_id(metadata)[1])
    return Bound(int(match[1]), int(match[2])) if match else None


def ends_in(metadata: Iterable[str]) -> set[int]:
    """The ends of the runs that made these commits, in ms since 1970: one, unless several runs share a group."""
    return {bound.until_ms for each in metadata if (bound := bound_in(each))}
