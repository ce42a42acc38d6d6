"""A micro-batch: the records that go through the stages together, as runs of one partition each."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from worker.core.events import Decoded, Event, Failure, Record, TooOld
from worker.core.sentiment import Sentiment
from worker.kafka.assignment import Assignment
from worker.pipeline.inference_job import Job
from worker.reasons import Reason, SkipReason
from worker.telemetry.tracing import BatchTrace


@dataclass(slots=True)
class Part:
    """The records of one assignment in a micro-batch. ``first_text`` is where their texts begin in its job."""

    assignment: Assignment
    records: Sequence[Record]
    decoded: list[Decoded]
    first_text: int


@dataclass(slots=True)
class MicroBatch:
    parts: list[Part]
    job: Job
    trace: BatchTrace | None = None

    def __len__(self) -> int:
        return sum(len(part.records) for part in self.parts)

    def failures(self) -> Counter[Reason | SkipReason]:
        """By reason, how many of its records cannot be scored. Those that became too old only in Kafka do not count."""
        reasons: Counter[Reason | SkipReason] = Counter()
        for part in self.parts:
            texts = len(part.decoded)
            if set(map(type, part.decoded)) != {Event}:
                reasons.update(decoded.reason for decoded in part.decoded if isinstance(decoded, Failure))
                reasons["too_old"] += part.decoded.count(TooOld.WHEN_WRITTEN)
                texts = sum(isinstance(decoded, Event) for decoded in part.decoded)
            answers = self.job.answers[part.first_text : part.first_text + texts]
            if set(map(type, answers)) != {Sentiment}:
                reasons["inference_failed"] += sum(not isinstance(answer, Sentiment) for answer in answers)
        return +reasons

    def beyond(self, seen: dict[Hashable, int]) -> "MicroBatch":
        """Its records at or after the offset that ``seen`` has for their partition; moves that offset behind them.

        Records before it have been seen already. They were read again after an abort, or because the group was joined again.
        """
        parts = []
        for part in self.parts:
            tp, next_offset = part.assignment.tp, part.records[-1].offset + 1
            first = bisect_left(part.records, seen.get(tp, 0), key=lambda record: record.offset)
            seen[tp] = max(next_offset, seen.get(tp, 0))
            texts = sum(type(decoded) is Event for decoded in part.decoded[:first])
            if first < len(part.records):
                parts.append(Part(part.assignment, part.records[first:], part.decoded[first:], part.first_text + texts))
        return MicroBatch(parts, self.job)
