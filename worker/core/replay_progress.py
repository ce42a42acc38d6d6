"""What of one partition of dead letters has been replayed already, by offset and reason. Pure.

A replay of some reasons or of some time leaves gaps, which a later one may fill: an offset to resume from does not say
enough. What goes beyond it is kept as spans in the commit's metadata.
"""

import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Final

Span = tuple[int, int]  # from an offset to before another

EVERY: Final = "*"  # whatever the reason
METADATA_BYTES: Final = 4_000  # a broker takes 4,096
_STATE: Final = re.compile(r"(?:[a-z0-9_*]+=\d+-\d+(?:,\d+-\d+)*(?:;|$))*")
# Earlier versions read no state that has a digit in a reason: 0 to 9 are written as *a to *j
_WITHOUT_DIGITS: Final = str.maketrans({str(digit): f"*{letter}" for digit, letter in enumerate("abcdefghij")})
_DIGIT: Final = re.compile(r"\*([a-j])")


class TooManySpans(Exception):
    """The state no longer fits into a commit."""


class Replayed:
    """Everything before ``offset`` has been done, and of ``spans``' reasons what lies in their spans."""

    def __init__(self, offset: int, spans: Mapping[str, Iterable[Span]] | None = None) -> None:
        self.offset = offset
        self._spans = {reason: sorted(of_reason) for reason, of_reason in (spans or {}).items()}
        self._tidy()

    @classmethod
    def read(cls, offset: int, metadata: str) -> "Replayed":
        """From a commit. Metadata that is not of ``metadata`` counts as none."""
        spans: dict[str, list[Span]] = {}
        if _STATE.fullmatch(metadata):
            for of_reason in filter(None, metadata.split(";")):
                reason, _, listed = of_reason.partition("=")
                if any(map(str.isdigit, reason)):
                    continue  # of a version that took such dead letters for none, and never sent them
                pairs = (span.split("-") for span in listed.split(","))
                reason = _DIGIT.sub(lambda letter: str(ord(letter[1]) - ord("a")), reason)
                spans[reason] = [(int(begin), int(end)) for begin, end in pairs]
        return cls(offset, spans)

    def metadata(self) -> str:
        """The spans, for the commit of ``offset``. Raises TooManySpans."""
        text = ";".join(
            f"{reason.translate(_WITHOUT_DIGITS)}={','.join(f'{begin}-{end}' for begin, end in spans)}"
            for reason, spans in self._spans.items()
        )
        if len(text) > METADATA_BYTES:
            raise TooManySpans
        return text

    def has(self, offset: int, reason: str) -> bool:
        """Whether the dead letter at an offset has been done."""
        if offset < self.offset:
            return True
        spans = [*self._spans.get(reason, ()), *self._spans.get(EVERY, ())]
        return any(begin <= offset < end for begin, end in spans)

    def add(self, begin: int, end: int, reasons: Iterable[str] = (), kept_back: Iterable[int] = ()) -> None:
        """Dead letters from ``begin`` to before ``end`` are done: those of these reasons, or all.

        Not so what is at the offsets ``kept_back``.
        """
        edges = [begin - 1, *sorted(kept_back), end]
        for reason in tuple(reasons) or (EVERY,):
            self._spans.setdefault(reason, []).extend((before + 1, after) for before, after in pairwise(edges))
        self._tidy()

    def forget_before(self, offset: int) -> None:
        """Dead letters before ``offset`` are gone from the topic."""
        self.offset = max(self.offset, offset)
        self._tidy()

    def _tidy(self) -> None:
        for begin, end in joined(self._spans.get(EVERY, ())):
            if begin <= self.offset:
                self.offset = max(self.offset, end)
        trimmed = {
            reason: joined((max(begin, self.offset), end) for begin, end in spans if end > self.offset)
            for reason, spans in self._spans.items()
        }
        self._spans = {reason: spans for reason, spans in sorted(trimmed.items()) if spans}


def joined(spans: Iterable[Span]) -> list[Span]:
    """The same offsets in as few spans as can be, in order."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if begin >= end:
            continue
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((begin, end))
    return found
