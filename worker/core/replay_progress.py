"""Which dead letters of a partition have been replayed already, by offset and reason. Pure.

A replay of some reasons, or of some time, leaves gaps that a later one may fill. So the committed offset alone does not say
what has been done; what has been done beyond it is kept as ranges of offsets in the commit's metadata.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

OffsetRange = tuple[int, int]
"""From the first offset to before the second."""

ANY_REASON: Final = "*"
MAX_METADATA_BYTES: Final = 4_000  # a broker takes 4,096
_METADATA: Final = re.compile(r"(?:[a-z0-9_*]+=\d+-\d+(?:,\d+-\d+)*(?:;|$))*")
# Earlier versions read no metadata with a digit in a reason, so 0 to 9 are written as *a to *j.
_ESCAPES: Final = str.maketrans({str(digit): f"*{letter}" for digit, letter in enumerate("abcdefghij")})
_ESCAPED_DIGIT: Final = re.compile(r"\*([a-j])")


class ProgressTooLarge(Exception):
    """The ranges no longer fit into a commit's metadata."""


class ReplayProgress:
    """What has been replayed of one partition: everything before ``offset``, and the ranges of each reason."""

    def __init__(self, offset: int, ranges: Mapping[str, Iterable[OffsetRange]] | None = None) -> None:
        self.offset = offset
        self._ranges = {reason: sorted(of_reason) for reason, of_reason in (ranges or {}).items()}
        self._tidy()

    @classmethod
    def read(cls, offset: int, metadata: str) -> "ReplayProgress":
        """The progress that a commit holds. Metadata that ``metadata`` would not write counts as none."""
        ranges: dict[str, list[OffsetRange]] = {}
        if _METADATA.fullmatch(metadata):
            for of_reason in filter(None, metadata.split(";")):
                reason, _, listed = of_reason.partition("=")
                if any(map(str.isdigit, reason)):
                    continue  # an earlier version wrote it, which did not send such dead letters
                reason = _ESCAPED_DIGIT.sub(lambda letter: str(ord(letter[1]) - ord("a")), reason)
                pairs = (pair.split("-") for pair in listed.split(","))
                ranges[reason] = [(int(begin), int(end)) for begin, end in pairs]
        return cls(offset, ranges)

    def metadata(self) -> str:
        """The ranges, for the commit of ``offset``. Raises ProgressTooLarge."""
        text = ";".join(
            f"{reason.translate(_ESCAPES)}={','.join(f'{begin}-{end}' for begin, end in ranges)}"
            for reason, ranges in self._ranges.items()
        )
        if len(text) > MAX_METADATA_BYTES:
            raise ProgressTooLarge
        return text

    def has(self, offset: int, reason: str) -> bool:
        """Whether the dead letter at an offset, which has this reason, has been replayed."""
        if offset < self.offset:
            return True
        ranges = [*self._ranges.get(reason, ()), *self._ranges.get(ANY_REASON, ())]
        return any(begin <= offset < end for begin, end in ranges)

    def add(self, begin: int, end: int, reasons: Iterable[str] = (), kept_back: Iterable[int] = ()) -> None:
        """Adds the dead letters from ``begin`` to before ``end``, those of the given reasons or else all.

        The offsets ``kept_back`` are left out.
        """
        edges = [begin - 1, *sorted(kept_back), end]
        for reason in tuple(reasons) or (ANY_REASON,):
            self._ranges.setdefault(reason, []).extend((before + 1, after) for before, after in pairwise(edges))
        self._tidy()

    def forget_before(self, offset: int) -> None:
        """Dead letters before ``offset`` are gone from the topic, so that nothing needs to be known about them."""
        self.offset = max(self.offset, offset)
        self._tidy()

    def _tidy(self) -> None:
        """Moves ``offset`` on where it can be, and keeps only ranges beyond it, as few as can be."""
        for begin, end in merge(self._ranges.get(ANY_REASON, ())):
            if begin <= self.offset:
                self.offset = max(self.offset, end)
        beyond = {
            reason: merge((max(begin, self.offset), end) for begin, end in ranges if end > self.offset)
            for reason, ranges in self._ranges.items()
        }
        self._ranges = {reason: ranges for reason, ranges in sorted(beyond.items()) if ranges}


def merge(ranges: Iterable[OffsetRange]) -> list[OffsetRange]:
    """The same offsets in as few ranges as possible, in order."""
    merged: list[OffsetRange] = []
    for begin, end in sorted(ranges):
        if begin >= end:
            continue
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((begin, end))
    return merged


@dataclass(slots=True)
class ReplayCounts:
    """How many dead letters of each reason were (or, by a dry run, would be) sent, could not be, or had been before.

    What is not recognised as a dead letter is kept back: each replay meets it again. ``first_kept_back`` says where the
    first is. ``left`` is an upper bound, for the ends of transactions take up offsets and hold no record.
    """

    sent: Counter[str] = field(default_factory=Counter)
    not_kept: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    kept_back: Counter[str] = field(default_factory=Counter)
    first_kept_back: str = ""
    done_before: int = 0
    left: int = 0


@dataclass(slots=True)
class PartitionReplay:
    """One partition of dead letters: what of it has been replayed, and the offsets that this replay goes on from and to."""

    done: ReplayProgress
    next: int
    end: int

    @property
    def left(self) -> int:
        return self.end - self.next
